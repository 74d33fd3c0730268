"""What an export did and how far what it wrote is from the adapter."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerMerge:
    """One layer's weight in its dtype, W' = fl(W0 + s B A), against the sum in fp32.

    `relative_error`: |W' - (W0 + s B A)| / |W0 + s B A|. `lost`: |s B A - (W' - W0)| / |s B A|, the share of the
    adapter's change that rounding takes. Frobenius norms.
    """

    relative_error: float
    lost: float


@dataclass(frozen=True)
class Merge:
    """`lost` as a layer's, over all layers together; `layers` by name."""

    lost: float
    layers: dict[str, LayerMerge]

    @property
    def relative_error(self) -> float:
        """The worst layer's."""
        return max(layer.relative_error for layer in self.layers.values())


@dataclass(frozen=True)
class Report:
    """Of the prompts' logits (largest absolute values): `effect`, adapter against base; `difference`, what was written
    against the adapter; `tolerance`, the largest difference that rounding explains (None: not bounded).
    `option_difference`: the largest difference of an option's probability.
    """

    format: str
    base: str
    dtype: str
    layers: int
    rank: int
    scaling: float
    effect: float | None = None
    difference: float | None = None
    tolerance: float | None = None
    option_difference: float | None = None
    merge: Merge | None = None
    notes: tuple[str, ...] = ()

    def lines(self) -> list[tuple[str, str]]:
        """Name and value of everything that was found, for people."""
        found = [("adapter", f"{self.layers} layers, rank {self.rank}, scaled by {self.scaling:g}")]
        if self.effect is not None:
            found.append(("effect", f"logits move by up to {self.effect:.3g} against the base, on the prompts tried"))
        if self.difference is not None:
            bound = "" if self.tolerance is None else f" (rounding explains {self.tolerance:.1e})"
            found.append(
                (
                    "loaded back",
                    f"logits differ from the adapter's by up to {self.difference:.2g}{bound}, options' probabilities "
                    f"by up to {self.option_difference:.2g}",
                )
            )
        if self.merge is not None:
            lost, error = 100 * self.merge.lost, self.merge.relative_error
            weights = f"; weights are within {error:.1e} of the fp32 sum in every layer" if error else ""
            found.append(
                ("merge", f"in {self.dtype} rounding takes {lost:.3g} % of the adapter's change (norm){weights}")
            )
        return found
