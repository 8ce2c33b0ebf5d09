"""Attention in C++ for CPUs with AVX2 or AVX-512, compiled when first used: what variants share of `impl=native`."""
