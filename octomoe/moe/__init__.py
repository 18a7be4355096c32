"""The order of ops: how a hidden state walks through a layer."""
