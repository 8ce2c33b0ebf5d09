"""The built-in attention variants, a file or folder each, registered through entry points as anyone's plugin is."""
