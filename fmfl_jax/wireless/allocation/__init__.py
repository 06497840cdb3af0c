"""Allocation problems with known optima: bandwidth (fdma), time and power (tdma), who uploads (schedule), who gets
which resource block (assignment). All pure JAX, jit- and vmap-able."""
