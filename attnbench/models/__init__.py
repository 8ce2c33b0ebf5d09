"""Published language models and encoders, loaded offline from installed packages, and what is asked of them."""
