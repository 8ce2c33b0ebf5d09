"""The built-in KV caches, a file each, registered through entry points as anyone's cache is."""
