"""The built-in attention variants, one a file, registered through the entry points that anyone's plugin uses."""
