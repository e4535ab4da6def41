"""The demo: a small trained sampler run by several processes, beside the same sampler run by one."""
