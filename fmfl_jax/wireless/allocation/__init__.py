"""Allocation problems with known optima: bandwidth (fdma), time and power (tdma), power over parallel channels
(power), who uploads (schedule), who gets which resource block (assignment). All pure JAX, jit- and vmap-able."""
