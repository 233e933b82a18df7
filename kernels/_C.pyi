# Addresses are tensor.data_ptr(); the Python wrapper beside each op makes every check.
has_cuda: bool
