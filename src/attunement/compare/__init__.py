"""The arena: methods compared on one's own model and data, each at its own best learning rate, with intervals."""
