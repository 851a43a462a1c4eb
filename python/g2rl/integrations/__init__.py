"""G2RL inside trainers of others; nothing of them is imported before its module here is."""
