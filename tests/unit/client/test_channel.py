"""Which channel an address gets. tests/e2e/test_drain_replicas.py has what comes of it."""

import json

import pytest

from redraft_client.channel import channel_options


@pytest.mark.parametrize(
    ("address", "watches_readiness"),
    [
        ("127.0.0.1:50051", False),
        ("server.example:50051", False),
        ("dns:///servers.example:50051", True),
        ("ipv4:127.0.0.1:50051,127.0.0.1:50052", True),
    ],
)
def test_only_where_there_are_others_to_turn_to_are_unready_servers_left_out(
    address: str, watches_readiness: bool
) -> None:
    config = json.loads(str(dict(channel_options(address))["grpc.service_config"]))
    assert config["loadBalancingConfig"] == [{"round_robin": {}}]
    assert ("healthCheckConfig" in config) == watches_readiness
