"""A Ray cluster as dagster-ray's resource; imported only where one is asked for."""

from dagster_ray import LocalRay
from pydantic import Field


class Cluster(LocalRay):
    """Connects a step to a cluster that is there already, or to one that it starts on this machine."""

    address: str = Field(description="As `ray.init` takes it: `auto`, `ray://host:10001`, `local` for one of its own.")

    @property
    def ray_address(self) -> str:
        """Where the cluster is."""
        return self.address
