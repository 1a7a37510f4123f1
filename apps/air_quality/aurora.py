"""Aurora (Bodnar et al. 2024, arXiv 2405.13063; package microsoft-aurora, tested with 2.0.1) as a forecast policy's step net.

The regional, surface-only form of arXiv 2511.22169: every channel of the policy is a surface variable, the frames in s, and what
Aurora says of the frames' variables is added to the last frame, so that an untrained one is persistence. The released class
wants what a step does not have: it gets a static variable and an atmospheric one that are constant, and the time of day and
year comes in the channels of `ahead`. Nothing is downloaded; `net.model.load_checkpoint_local(path, strict=False)` takes over
what fits.

It is meant for rollout.distribution=gaussian, whose mean nothing bounds above the highest class edge. The dense anchor that
holds it is the closed-form KL to the reference, beta (mean - its mean)^2 / (2 sigma^2) per decision: set objective.beta above
0. A reward of closeness to the observation is the other anchor there can be; it is no part of this file.

Not covered: the pretrained air pollution model, whose 13 levels and 30 variables an archive of two pollutants does not hold.
"""

from __future__ import annotations

import warnings
from datetime import datetime
from typing import Any

import torch
from torch import Tensor, nn

from core.config import ConfigError
from core.policy.step_nets import StepNet

CONSTANT = "constant"
WIND, LEVEL = "u", 1000  # an atmospheric variable whose mean is about 0
ANY_TIME = datetime(2000, 1, 1)
# As in the code of arXiv 2511.22169, for 128 x 174 cells.
REGIONAL = {"patch_size": 2, "window_size": (1, 8, 3), "latent_levels": 2, "use_lora": False}


class AuroraNet(StepNet):
    """variables: of the frames. lat, lon: lists, of the rows and columns or (Y, X), degrees; row 0 is the southernmost.

    inputs: channels of the policy, of which the first 2 * history * len(variables) are frames and where they were seen.
    model: arguments of aurora.Aurora beside `REGIONAL`; embed_dim and depths decide the size, 1.3 billion parameters by default.
    On several GPUs set trainer.ddp_find_unused_parameters=true: the atmospheric part of the decoder has nothing to say.

    Raises ConfigError if microsoft-aurora is not installed, for a map that does not divide into patches, and for positions
    that are no lists.
    """

    def __init__(
        self,
        inputs: int,
        variables: list[str],
        lat: list[Any],
        lon: list[Any],
        history: int = 2,
        model: dict[str, Any] | None = None,
    ):
        super().__init__()
        try:
            from aurora import Aurora, Batch, Metadata
        except ImportError as error:
            raise ConfigError("AuroraNet needs the package microsoft-aurora; pip install microsoft-aurora") from error
        if not (isinstance(lat, list) and isinstance(lon, list)):
            raise ConfigError(
                f"lat and lon are {type(lat).__name__} and {type(lon).__name__}; give lists (.tolist()), which are saved"
            )
        sizes = REGIONAL | (model or {})
        self.variables, self.history, self._batch, self._metadata = list(variables), history, Batch, Metadata
        self.lat, self.lon = torch.tensor(lat).flip(0), torch.tensor(lon)  # Aurora's first row is the northernmost
        if self.lon.dim() == 2:
            self.lon = self.lon.flip(0)
        self.lon = self.lon % 360
        rows, columns, patch = len(self.lat), self.lon.shape[-1], sizes["patch_size"]
        if rows % patch or columns % patch:
            raise ConfigError(f"{rows} x {columns} cells do not divide into patches of {patch}; set another patch_size")
        others = inputs - 2 * history * len(variables)
        self.names = [*variables, *(f"seen_{name}" for name in variables), *(f"channel_{i}" for i in range(others))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that we set the normalisation ourselves
            self.model = Aurora(
                surf_vars=tuple(self.names),
                static_vars=(CONSTANT,),
                atmos_vars=(WIND,),
                max_history_size=history,
                surf_stats=dict.fromkeys([*self.names, CONSTANT], (0.0, 1.0)),
                **{name: tuple(size) if isinstance(size, list) else size for name, size in sizes.items()},
            )
        for name in variables:
            nn.init.zeros_(self.model.decoder.surf_heads[name].weight)
            nn.init.zeros_(self.model.decoder.surf_heads[name].bias)

    def step(self, x: Tensor, memory: None = None) -> tuple[Tensor, None]:
        """x (N, inputs, Y, X) -> what is added to the last frame, (N, V, Y, X)."""
        x = x.flip(2)
        count, size = len(x), len(self.variables)
        over_time = x[:, : 2 * self.history * size].unflatten(1, (2, self.history, size))  # frames and seen
        surface = dict(zip(self.names, over_time.transpose(1, 2).flatten(2, 3).unbind(2), strict=False))
        for name, channel in zip(self.names[2 * size :], x[:, 2 * self.history * size :].unbind(1), strict=True):
            surface[name] = channel.unsqueeze(1).expand(-1, self.history, -1, -1)
        nothing = x.new_zeros(x.shape[2:])
        batch = self._batch(
            surf_vars=surface,
            static_vars={CONSTANT: nothing},
            atmos_vars={WIND: nothing.expand(count, self.history, 1, -1, -1)},
            metadata=self._metadata(self.lat, self.lon, (ANY_TIME,) * count, (LEVEL,)),
        )
        said = self.model(batch).surf_vars
        return torch.cat([said[name] for name in self.variables], dim=1).flip(2), None

    def gradient_checkpointing_enable(self, settings: dict[str, Any] | None = None) -> None:
        """What trainer.gradient_checkpointing calls; `settings` are not Aurora's."""
        self.model.configure_activation_checkpointing()
