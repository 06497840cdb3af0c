"""The network of a federated round: its configuration, its state, and the large-scale channel of every client.

A `Network` is one base station (or num_cells independent copies of it) with num_clients clients. `simulate.py` runs a
round over it; `presets.py` has the networks of the literature.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fmfl_jax.finite import finite_fields
from fmfl_jax.wireless import fading, geometry, link, path_loss, penetration, special, transfer

PATH_LOSS_MODELS = ("log_distance", "umi", "uma")
SCHEDULERS = {
    "fdma": ("equal", "min_time", "min_energy"),
    "ofdma": ("equal", "min_time", "assign"),
    "tdma": ("fifo", "most_clients", "fedcs"),
}
TRANSFER_MODES = ("static", "packet", "slots")
DOWNLINKS = ("broadcast", "unicast")


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite_fields(may_be_infinite=("deadline_s", "energy_limit_j"))
class Network:
    """A wireless network. Every quantity carries its unit in its name; bandwidths and powers are per cell and per
    client.

    Place: num_clients in num_cells equal cells (client k lives in cell k // (num_clients / num_cells)); cell shape and
      radius; nobody nearer than min_distance_m; mobility "static", "random_waypoint" or "gauss_markov".
    Channel: path_loss_model "log_distance" (intercept at 1 m, slope per decade, shadowing) or TR 38.901 "umi" / "uma"
      with its own LOS, shadowing and Rician K. rician_k_db is the K of "log_distance" (None: Rayleigh). penetration:
      with TR 38.901, where all clients are: "none" (outdoors), "o2i_low" or "o2i_high" (in a building of that loss),
      "car".
    Uplink: access and scheduler (see SCHEDULERS); transmit power, with open-loop control if p0_dbm is given;
      antenna_gain_db of both ends together, both ways; rate_model "shannon" (with gap_db) or "mcs".
      transfer_mode: "static" (no fading), "packet" (one fade, one packet: waterfall), "slots" (time-resolved, HARQ).
      block_interference_w: interference power on each resource block ("assign").
    Downlink: one band of downlink_bandwidth_hz at bs_power_dbm, "broadcast" at the worst client's rate or "unicast".
    Round: deadline_s from the start of the round (inf: none), wait_for arrivals (None: all), energy_limit_j per client
      and round (a client that would exceed it is not scheduled). max_uplink_s, max_downlink_s, max_base_delivery_s:
      after which an upload, a round's downlink and the delivery of the base model give up; a client that would need a
      longer downlink is out of reach, and nobody waits for it.
      probability_samples: replicas of the fast fading behind RoundOutcome.delivery_probability where no formula has it.
    """

    num_clients: int
    num_cells: int = 1
    cell: str = "disk"
    cell_radius_m: float = 500.0
    min_distance_m: float = 10.0
    mobility: str = "static"
    speed_mps: float = 0.8333  # 3 km/h; of a static client: of what moves around it (Doppler)
    memory_s: float = 20.0

    path_loss_model: str = "log_distance"
    intercept_db: float = 15.3
    slope_db: float = 37.6
    shadowing_db: float = 0.0
    shadowing_correlation_m: float = 50.0
    rician_k_db: float | None = None
    fc_ghz: float = 3.5
    penetration: str = "none"

    bandwidth_hz: float
    access: str = "fdma"
    scheduler: str = "equal"
    resource_block_hz: float = link.RESOURCE_BLOCK_HZ
    block_interference_w: tuple[float, ...] = ()
    tx_power_dbm: float
    antenna_gain_db: float = 0.0
    p0_dbm: float | None = None
    power_control_alpha: float = 1.0
    noise_figure_db: float = 0.0
    interference_margin_db: float = 0.0
    rate_model: str = "shannon"
    gap_db: float = 0.0
    transfer_mode: str = "static"
    waterfall: float = 1.0
    slot_s: float = 1e-3
    harq: str = "type1"
    max_attempts: int = 4

    downlink: str = "broadcast"
    downlink_bandwidth_hz: float
    bs_power_dbm: float
    ue_noise_figure_db: float = 0.0

    deadline_s: float = math.inf
    wait_for: int | None = None
    energy_limit_j: float = math.inf
    max_uplink_s: float = 3600.0
    max_downlink_s: float = 3600.0
    max_base_delivery_s: float = 86400.0
    probability_samples: int = 32

    def __post_init__(self):
        for name in (
            "num_clients",
            "num_cells",
            "cell_radius_m",
            "fc_ghz",
            "bandwidth_hz",
            "resource_block_hz",
            "slot_s",
            "waterfall",
            "max_attempts",
            "downlink_bandwidth_hz",
            "deadline_s",
            "energy_limit_j",
            "max_uplink_s",
            "max_downlink_s",
            "max_base_delivery_s",
            "memory_s",
            "shadowing_correlation_m",
            "probability_samples",
        ):
            special.require_positive(**{f"Network.{name}": getattr(self, name)})
        for name in ("tx_power_dbm", "bs_power_dbm"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"Network.{name} must be finite, got {getattr(self, name)}: 0 W is no transmitter")
        if self.num_clients % self.num_cells:
            raise ValueError(f"num_clients={self.num_clients} must be a multiple of num_cells={self.num_cells}")
        if not 0.0 <= self.min_distance_m < self.cell_radius_m:
            raise ValueError(f"min_distance_m must be in [0, cell_radius_m), got {self.min_distance_m}")
        if min(self.speed_mps, self.shadowing_db, self.noise_figure_db, self.ue_noise_figure_db, self.gap_db) < 0.0:
            raise ValueError("speed_mps, shadowing_db, noise figures and gap_db must be >= 0")
        if self.wait_for is not None and not 1 <= self.wait_for <= self.num_clients:
            raise ValueError(f"wait_for must be between 1 and num_clients={self.num_clients}, got {self.wait_for}")
        for name in ("max_uplink_s", "max_downlink_s", "max_base_delivery_s"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite: a transfer in outage would never end")
        self._check_choices()

    def _check_choices(self):
        choices = {
            "cell": geometry.CELL_SHAPES,
            "mobility": geometry.MOBILITY_MODELS,
            "path_loss_model": PATH_LOSS_MODELS,
            "penetration": penetration.KINDS,
            "access": tuple(SCHEDULERS),
            "rate_model": transfer.RATE_MODELS,
            "transfer_mode": TRANSFER_MODES,
            "harq": transfer.HARQ_MODES,
            "downlink": DOWNLINKS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"Network.{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.penetration != "none" and self.scenario is None:
            raise ValueError("penetration belongs to TR 38.901: set path_loss_model to 'umi' or 'uma'")
        if self.scheduler not in SCHEDULERS[self.access]:
            raise ValueError(
                f"scheduler of {self.access} must be one of {SCHEDULERS[self.access]}, got {self.scheduler!r}"
            )
        if self.access == "ofdma" and self.num_blocks < 1:
            raise ValueError(f"bandwidth_hz={self.bandwidth_hz} holds no resource block of {self.resource_block_hz} Hz")
        if self.scheduler == "min_energy" and not math.isfinite(self.deadline_s):
            raise ValueError("scheduler='min_energy' spends the time up to the deadline: set deadline_s")
        if self.scheduler == "assign" and len(self.block_interference_w) not in (0, self.num_blocks):
            raise ValueError(
                f"block_interference_w needs one entry for each of {self.num_blocks} blocks, "
                f"got {len(self.block_interference_w)}"
            )
        if self.transfer_mode == "packet" and self.rate_model != "shannon":
            raise ValueError(
                "transfer_mode='packet' (Chen et al.) has an ergodic Shannon rate: set rate_model='shannon'"
            )

    @property
    def clients_per_cell(self) -> int:
        return self.num_clients // self.num_cells

    @property
    def num_blocks(self) -> int:
        """Resource blocks of the uplink band."""
        return int(self.bandwidth_hz * (1.0 + 1e-9) // self.resource_block_hz)

    @property
    def scenario(self) -> path_loss.Scenario | None:
        """TR 38.901's constants, None for the log-distance law."""
        return {"umi": path_loss.UMI, "uma": path_loss.UMA, "log_distance": None}[self.path_loss_model]


class NetworkState(NamedTuple):
    """What lasts from round to round: positions, the shadowing and LOS fields of each cell (leading axis [cells]),
    standard normal draws [C] of each client's Rician K and penetration loss, metres [C] it is behind a wall (if it is
    indoors), seconds since the start [], rounds so far []."""

    motion: geometry.Motion
    shadow_field: fading.Field
    los_field: fading.Field
    rician_draw: jax.Array
    penetration_draw: jax.Array
    indoor_m: jax.Array
    time_s: jax.Array
    round: jax.Array


class Channel(NamedTuple):
    """The large-scale channel of each client, [C]: distance m, LOS, path loss (penetration included) and shadowing dB,
    power gain dB (antenna gain - path loss - shadowing), linear Rician K (0: Rayleigh)."""

    distance_m: jax.Array
    los: jax.Array
    path_loss_db: jax.Array
    shadowing_db: jax.Array
    path_gain_db: jax.Array
    rician_k: jax.Array


def init_network(config: Network, key) -> NetworkState:
    """Drops the clients and draws the fields. One key, one network."""
    k_drop, k_motion, k_shadow, k_los, k_rician = jax.random.split(key, 5)
    position = geometry.drop_users(k_drop, config.num_clients, config.cell, config.cell_radius_m, config.min_distance_m)
    motion = geometry.init_motion(
        k_motion, position, config.mobility, config.speed_mps, config.cell, config.cell_radius_m
    )
    shadow, los = (jax.vmap(fading.init_field)(jax.random.split(k, config.num_cells)) for k in (k_shadow, k_los))
    draw = jax.random.normal(k_rician, (config.num_clients,))
    k_wall, k_indoor = jax.random.split(jax.random.fold_in(key, 5))
    wall = jax.random.normal(k_wall, (config.num_clients,))
    indoor_m = penetration.draw_indoor_m(k_indoor, config.num_clients)
    return NetworkState(motion, shadow, los, draw, wall, indoor_m, jnp.zeros(()), jnp.zeros((), jnp.int32))


def advance(config: Network, state: NetworkState, key, seconds) -> NetworkState:
    """Everybody moves for some seconds."""
    motion = geometry.move(
        key,
        state.motion,
        seconds,
        mobility=config.mobility,
        speed_mps=config.speed_mps,
        memory_s=config.memory_s,
        cell=config.cell,
        cell_radius_m=config.cell_radius_m,
        min_distance_m=config.min_distance_m,
    )
    return state._replace(motion=motion, time_s=state.time_s + seconds)


def by_cell(config: Network, array):
    """[C, ...] -> [cells, C / cells, ...]."""
    return array.reshape((config.num_cells, config.clients_per_cell) + array.shape[1:])


def channel(config: Network, state: NetworkState) -> Channel:
    """The large-scale channel at the clients' present positions. A function of the state alone: no key."""
    position = state.motion.position_m
    distance = jnp.sqrt(jnp.sum(jnp.square(position), axis=1))
    evaluate = jax.vmap(fading.field_at)
    cells = by_cell(config, position)  # [cells, U, 2]
    scenario = config.scenario
    if scenario is None:
        los = jnp.zeros(distance.shape, bool)
        loss = path_loss.log_distance_db(distance, config.intercept_db, config.slope_db)
        std = jnp.full(distance.shape, config.shadowing_db)
        correlation = jnp.full(distance.shape, config.shadowing_correlation_m)
        k_db = -math.inf if config.rician_k_db is None else config.rician_k_db
        rician_k = jnp.full(distance.shape, 10.0 ** (k_db / 10.0), distance.dtype)
    else:
        at_los = evaluate(state.los_field, cells, jnp.full(cells.shape[:2], path_loss.LOS_CORRELATION_M))
        # A uniform field in place of a coin for each client: neighbours agree, and walking changes it smoothly.
        uniform = jax.scipy.stats.norm.cdf(at_los.reshape(-1))
        indoor = penetration.is_indoor(config.penetration)
        outdoor_m = jnp.maximum(distance - state.indoor_m, 0.0) if indoor else distance
        los = uniform < path_loss.los_probability(outdoor_m, scenario.los_decay_m)
        law = path_loss.umi_db if config.path_loss_model == "umi" else path_loss.uma_db
        loss = law(distance, los, fc_ghz=config.fc_ghz)
        std = jnp.where(los, scenario.shadow_los_db, scenario.shadow_nlos_db)
        correlation = jnp.where(los, scenario.correlation_los_m, scenario.correlation_nlos_m)
        drawn = special.db_to_linear(scenario.rician_mean_db + scenario.rician_std_db * state.rician_draw)
        rician_k = jnp.where(los, drawn, 0.0)
        if config.penetration != "none":
            loss += penetration.penetration_db(
                config.penetration, config.fc_ghz, state.indoor_m, state.penetration_draw
            )
        if indoor:  # Table 7.5-6, O2I: its own shadowing, no specular part
            std = jnp.full_like(std, penetration.INDOOR_SHADOWING_DB)
            correlation = jnp.full_like(correlation, penetration.INDOOR_CORRELATION_M)
            rician_k = jnp.zeros_like(rician_k)
    if scenario is None and config.shadowing_db == 0.0:
        shadowing = jnp.zeros_like(distance)
    else:
        shadowing = std * evaluate(state.shadow_field, cells, by_cell(config, correlation)).reshape(-1)
    return Channel(distance, los, loss, shadowing, config.antenna_gain_db - loss - shadowing, rician_k)


def uplink_cn0_hz(config: Network, path_gain_db):
    """(C/N0 [C] Hz, transmit power [C] dBm) at the power that the control allows.

    Power control counts the resource blocks of an equal share of the band: what is allocated depends on the power.
    """
    if config.p0_dbm is None:
        power = jnp.full_like(path_gain_db, config.tx_power_dbm)
    else:
        share_hz = config.bandwidth_hz if config.access == "tdma" else config.bandwidth_hz / config.clients_per_cell
        power = link.uplink_power_dbm(
            -path_gain_db,
            share_hz / config.resource_block_hz,
            max_dbm=config.tx_power_dbm,
            p0_dbm=config.p0_dbm,
            alpha=config.power_control_alpha,
        )
    cn0 = link.carrier_to_noise_hz(power, path_gain_db, config.noise_figure_db, config.interference_margin_db)
    return cn0, power


def planned_rate_bps(config: Network, bandwidth_hz, cn0_hz):
    """The rate without fading, by the configured rate model, [C] bit/s; 0 below the lowest MCS."""
    if config.rate_model == "shannon":
        return link.shannon_rate_bps(bandwidth_hz, cn0_hz, 10.0 ** (config.gap_db / 10.0))
    snr = jnp.where(bandwidth_hz > 0.0, cn0_hz / jnp.maximum(bandwidth_hz, 1e-30), 0.0)
    thresholds = link.mcs_thresholds_db(reference_symbols(config))
    return link.mcs_rate_bps(bandwidth_hz, snr, thresholds, config.slot_s)


def reference_symbols(config: Network) -> float:
    """Symbols of a transport block at an equal share of the band: the length for which MCS thresholds are computed."""
    share_hz = config.bandwidth_hz if config.access == "tdma" else config.bandwidth_hz / config.clients_per_cell
    return max(share_hz * config.slot_s, 12.0)


def downlink_rate_bps(config: Network, path_gain_db):
    """Full-band downlink rate without fading, [C] bit/s."""
    cn0 = link.carrier_to_noise_hz(config.bs_power_dbm, path_gain_db, config.ue_noise_figure_db)
    band = jnp.full_like(path_gain_db, config.downlink_bandwidth_hz)
    if config.rate_model == "shannon":
        return link.shannon_rate_bps(band, cn0, 10.0 ** (config.gap_db / 10.0))
    thresholds = link.mcs_thresholds_db(config.downlink_bandwidth_hz * config.slot_s)
    return link.mcs_rate_bps(band, cn0 / config.downlink_bandwidth_hz, thresholds, config.slot_s)
