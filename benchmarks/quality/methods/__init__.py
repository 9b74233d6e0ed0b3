"""What is compared: methods by name, at equal numbers of trainable parameters."""
