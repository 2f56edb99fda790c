"""What is timed: kinds of experts, hierarchies, sizes and routes."""
