"""The counter: check arguments, choose a backend, call. Registered with torch.library."""
