"""Several processes that train one model: who does what, what they tell each other, and what is kept where.

The rest of the trainer sees `ranks.Ranks` alone; one process is the default, and costs nothing.
"""
