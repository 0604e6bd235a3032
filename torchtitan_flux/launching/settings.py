"""The environment variables of run_train.sh and run_infer.sh."""

from collections.abc import Mapping
from dataclasses import dataclass

from torchtitan_flux.startup.load_config import ConfigError


@dataclass(frozen=True)
class Settings:
    """How many ranks, where, and what is shown of them.

    Attributes:
        node_rank: number of this machine.
        endpoint: host:port at which several nodes meet.
        shown: ranks whose output is shown.
        grace: seconds that ranks get to save.
    """

    ranks_per_node: int = 1
    nodes: int = 1
    node_rank: int = 0
    endpoint: str = ""
    shown: frozenset[int] = frozenset({0})
    grace: int = 600
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

        per_node, nodes, grace = whole("NGPU", 1, 1), whole("NNODES", 1, 1), whole("GRACE", 600, 0)
        node_rank = whole("NODE_RANK", 0, 0)
        if node_rank >= nodes or (nodes > 1 and "NODE_RANK" not in value):
            found.append(f"NODE_RANK: each of NNODES = {nodes} has its own, 0 to {nodes - 1}")
        endpoint = value.get("RDZV_ENDPOINT", "")
        host, _, port = endpoint.rpartition(":")
        if nodes > 1 and not (host and port.isdecimal() and 0 < int(port) < 65536):
            found.append(
                f"RDZV_ENDPOINT = {endpoint!r} must be host:port of the first node: node0:29500"
            )
        ranks = value.get("LOG_RANK", "0").split(",")
        shown = frozenset(int(rank) for rank in ranks if rank.strip().isdecimal())
        if len(shown) < len(set(ranks)) or max(shown) >= per_node * nodes:
            found.append(
                f"LOG_RANK = {','.join(ranks)!r} must list ranks from 0 to {per_node * nodes - 1}"
            )
        if found:
            raise ConfigError(found)
        config_file = value.get("CONFIG_FILE", cls.config_file)
        return cls(per_node, nodes, node_rank, endpoint, shown, grace, config_file)
