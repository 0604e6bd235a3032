"""The environment variables of run_train.sh and run_infer.sh."""

from collections.abc import Mapping
from dataclasses import dataclass

from torchtitan_flux.startup.load_config import ConfigError


@dataclass(frozen=True)
class Settings:
    """How many ranks, where, and what is shown of them."""

    ranks_per_node: int = 1
    nodes: int = 1
    node_rank: int | None = None
    """None where the nodes are to number themselves."""
    endpoint: str = ""
    """host:port at which several nodes meet."""
    shown: frozenset[int] = frozenset({0})
    """Ranks whose output is shown."""
    grace: int = 600
    """Seconds that ranks get to save."""
    config_file: str = "train_configs/flux_digits.toml"

    @property
    def ranks(self) -> int:
        """Over all nodes."""
        return self.ranks_per_node * self.nodes

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> "Settings":
        """From NGPU, NNODES, NODE_RANK, RDZV_ENDPOINT, LOG_RANK, GRACE, CONFIG_FILE.

        An empty variable counts as unset.

        Raises:
            ConfigError: with everything that is wrong.
        """
        found: list[str] = []
        value = {name: text.strip() for name, text in environment.items() if text.strip()}

        def whole(name: str, default: int, least: int) -> int:
            text = value.get(name, str(default))
            if text.isdecimal() and int(text) >= least:
                return int(text)
            found.append(f"{name} = {text!r} must be a whole number, at least {least}")
            return default

        per_node, nodes = whole("NGPU", 1, 1), whole("NNODES", 1, 1)
        node_rank = whole("NODE_RANK", 0, 0) if "NODE_RANK" in value else None
        if node_rank is not None and node_rank >= nodes:
            found.append(f"NODE_RANK = {node_rank}: with NNODES = {nodes} it is below {nodes}")
        endpoint = value.get("RDZV_ENDPOINT", "")
        if nodes > 1:
            found += _endpoint_problems(endpoint, nodes)
        ranks = value.get("LOG_RANK", "0").split(",")
        if not all(rank.strip().isdecimal() for rank in ranks):
            found.append(f"LOG_RANK = {','.join(ranks)!r} must list ranks, e.g. 0 or 0,1")
            ranks = ["0"]
        shown = frozenset(int(rank) for rank in ranks)
        if not found and max(shown) >= per_node * nodes:
            found.append(
                f"LOG_RANK = {','.join(ranks)}: the ranks are 0 to {per_node * nodes - 1} "
                f"(NGPU = {per_node}, NNODES = {nodes})"
            )
        grace = whole("GRACE", 600, 0)
        if found:
            raise ConfigError(found)
        return cls(
            per_node, nodes, node_rank, endpoint, shown, grace,
            value.get("CONFIG_FILE", cls.config_file),
        )  # fmt: skip


def _endpoint_problems(endpoint: str, nodes: int) -> list[str]:
    if not endpoint:
        return [
            f"RDZV_ENDPOINT is not set: with NNODES = {nodes} every node needs the same host:port, "
            "that of the first node"
        ]
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        return [f"RDZV_ENDPOINT = {endpoint!r} must be host:port, e.g. node0:29500"]
    return []
