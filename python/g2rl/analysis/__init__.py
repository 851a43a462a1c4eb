"""Studies of models by their responses: geometry of gradient features, and how well they stand for true gradients."""
