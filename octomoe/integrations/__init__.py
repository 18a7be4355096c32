"""Other people's classes, one file each: translate names, call ops."""
