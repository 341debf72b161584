"""Native CPU kernels: built at install where a C compiler exists, absent otherwise."""
