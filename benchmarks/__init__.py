"""What is measured, and how README's tables are made of it."""
