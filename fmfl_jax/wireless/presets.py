"""Networks of the literature, one function each. What a paper leaves open is set here and said so.

Values are those of the papers as listed in the project's facts; keyword arguments override any field:
`chen(deadline_s=1.0)`.
"""

import math

import numpy as np

from fmfl_jax.wireless import geometry
from fmfl_jax.wireless.network import Network, NetworkState, init_network


def _build(defaults: dict, overrides: dict) -> Network:
    return Network(**{**defaults, **overrides})


def umi_20(**overrides) -> Network:
    """This project's own: 20 clients walking in a 500 m UMi cell at 3.5 GHz, 20 MHz, 23 dBm, time-resolved transfers.

    Base station 46 dBm with an 8 dBi antenna (TR 38.901 Table 7.3-1), noise figures 5 dB (base station) and 9 dB
    (client), a 3 dB margin and giving up after 2 minutes are this project's choice.
    """
    return _build(
        dict(
            num_clients=20,
            cell_radius_m=500.0,
            path_loss_model="umi",
            fc_ghz=3.5,
            mobility="gauss_markov",
            bandwidth_hz=20e6,
            access="fdma",
            scheduler="min_time",
            tx_power_dbm=23.0,
            antenna_gain_db=8.0,
            noise_figure_db=5.0,
            max_uplink_s=120.0,
            max_downlink_s=120.0,
            interference_margin_db=3.0,
            rate_model="mcs",
            transfer_mode="slots",
            harq="chase",
            downlink_bandwidth_hz=20e6,
            bs_power_dbm=46.0,
            ue_noise_figure_db=9.0,
        ),
        overrides,
    )


def facts_20(**overrides) -> Network:
    """The 20-client worked example of the facts: 128.1 + 37.6 log10(d/km), 23 dBm, Shannon, no fading, no noise figure.
    Place the clients with `rings_20`."""
    return _build(
        dict(
            num_clients=20,
            cell_radius_m=500.0,
            bandwidth_hz=20e6,
            scheduler="min_time",
            tx_power_dbm=23.0,
            downlink_bandwidth_hz=20e6,
            bs_power_dbm=46.0,
        ),
        overrides,
    )


def rings_20(config: Network, key) -> NetworkState:
    """A state with client k at distance R sqrt((k + .5)/C): equal areas, so no drop is luckier than another."""
    state = init_network(config, key)
    k = np.arange(config.num_clients)
    distance = config.cell_radius_m * np.sqrt((k + 0.5) / config.num_clients)
    angle = k * (math.pi * (3.0 - math.sqrt(5.0)))
    position = np.stack([distance * np.cos(angle), distance * np.sin(angle)], axis=1).astype(np.float32)
    position = state.motion.position_m * 0.0 + position
    return state._replace(motion=geometry.Motion(position, state.motion.velocity_mps, position))


def chen(**overrides) -> Network:
    """Chen et al., "A Joint Learning and Communications Framework for Federated Learning Over Wireless Networks", TWC
    2021.

    15 users in a 500 m disk, 12 resource blocks of 150 kHz, path gain d^-2 and Rayleigh fades, 10 dBm users, 1 W base
    station with 20 MHz, 500 ms and 3 mJ a round; one packet over one fade; blocks by the Hungarian method. Interference
    per block: the paper gives no list; 12 values from 0.01 to 0.12 uW, the order of the authors' published simulation
    (github.com/mzchen0/Wireless-FL), whose waterfall factor of 1.08 is used too (the paper prints 0.023 dB).
    """
    return _build(
        dict(
            num_clients=15,
            cell_radius_m=500.0,
            min_distance_m=1.0,
            intercept_db=0.0,
            slope_db=20.0,
            bandwidth_hz=12 * 150e3,
            access="ofdma",
            scheduler="assign",
            resource_block_hz=150e3,
            block_interference_w=tuple(np.linspace(1e-8, 1.2e-7, 12).tolist()),
            tx_power_dbm=10.0,
            transfer_mode="packet",
            waterfall=1.08,
            downlink_bandwidth_hz=20e6,
            bs_power_dbm=30.0,
            deadline_s=0.5,
            energy_limit_j=3e-3,
        ),
        overrides,
    )


def yang(**overrides) -> Network:
    """Yang et al., "Energy Efficient Federated Learning Over Wireless Communication Networks", TWC 2021.

    50 users in a square of 500 m x 500 m, 20 MHz FDMA, 128.1 + 37.6 log10(d/km), 8 dB shadowing, 10 dBm; updates of
    28.1 kbit; users compute at up to 2 GHz with kappa 1e-28. Base station 46 dBm (not in the facts).
    """
    return _build(
        dict(
            num_clients=50,
            cell="square",
            cell_radius_m=250.0,
            shadowing_db=8.0,
            bandwidth_hz=20e6,
            scheduler="min_time",
            tx_power_dbm=10.0,
            downlink_bandwidth_hz=20e6,
            bs_power_dbm=46.0,
        ),
        overrides,
    )


def fedcs(**overrides) -> Network:
    """Nishio and Yonetani, "Client Selection for Federated Learning with Heterogeneous Resources in Mobile Edge", ICC
    2019.

    1000 clients in a 2 km cell, sequential LTE uploads in 10 resource blocks (1.8 MHz), greedy selection, 3-minute
    rounds; models of 18.3 MB. Path loss 22.7 + 36.7 log10 d + 26 log10 2.5 (ITU-R M.2135 UMi NLOS), 20 dBm both ways
    and noise figure 5 dB are this project's choice; antenna_gain_db is calibrated to the paper's mean rate of 1.4
    Mbit/s over the cell. The MCS table ends at 9.0 Mbit/s, the paper's rates at 8.6.
    """
    return _build(
        dict(
            num_clients=1000,
            cell_radius_m=2000.0,
            intercept_db=22.7 + 26.0 * math.log10(2.5),
            slope_db=36.7,
            fc_ghz=2.5,
            bandwidth_hz=1.8e6,
            access="tdma",
            scheduler="fedcs",
            tx_power_dbm=20.0,
            noise_figure_db=5.0,
            antenna_gain_db=19.0,
            rate_model="mcs",
            downlink_bandwidth_hz=1.8e6,
            bs_power_dbm=20.0,
            ue_noise_figure_db=5.0,
            deadline_s=180.0,
        ),
        overrides,
    )


def tran(**overrides) -> Network:
    """Tran et al., "Federated Learning over Wireless Networks: Optimization Model Design and Analysis", INFOCOM 2019.

    5 users within 50 m, TDMA over 1 MHz, path gain -40 dB (1 m / d)^4, at most 1 W. Their total noise of 1e-9 W in 1
    MHz is 54 dB above thermal noise and enters as a noise figure. The joint optimum is
    `allocation.tdma.joint_energy_time`.
    """
    return _build(
        dict(
            num_clients=5,
            cell_radius_m=50.0,
            min_distance_m=2.0,
            intercept_db=40.0,
            slope_db=40.0,
            bandwidth_hz=1e6,
            access="tdma",
            scheduler="fifo",
            tx_power_dbm=30.0,
            noise_figure_db=54.0,
            downlink_bandwidth_hz=1e6,
            bs_power_dbm=30.0,
        ),
        overrides,
    )


PRESETS = {"umi_20": umi_20, "facts_20": facts_20, "chen": chen, "yang": yang, "fedcs": fedcs, "tran": tran}
