"""Attention kernels in C++ for CPUs with AVX-512, compiled when first used: what variants share of `impl=avx512`."""
