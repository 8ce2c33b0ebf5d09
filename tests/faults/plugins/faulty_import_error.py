raise ImportError("the kernel library is not there")
