"""What a kernel may be told: configurations, and which one to take for a problem."""
