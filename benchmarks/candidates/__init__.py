"""What competes: this project's backends, peers, and the floor of plain matrix products."""
