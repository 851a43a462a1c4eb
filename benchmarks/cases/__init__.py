"""What is measured, as data, and the inputs it is measured on."""
