"""The base class of perturbations that change another perturbation."""

from steppe.rules.protocols import (
    Perturbation,
    ascent_steps,
    averages_memory,
    follows_gradient,
    needs_gradient,
    scale_free,
)


class Modifier:
    """A perturbation built from another one, ``rule``; it has the same needs as that rule."""

    rule: Perturbation

    @property
    def needs_gradient(self) -> bool:
        """True if the modified rule needs the gradient at w."""
        return needs_gradient(self.rule)

    @property
    def follows_gradient(self) -> bool:
        """True if the modified rule is made of gradients."""
        return follows_gradient(self.rule)

    @property
    def ascent_steps(self) -> int:
        """Number of ascent steps that the modified rule makes in one step."""
        return ascent_steps(self.rule)

    @property
    def scale_free(self) -> bool:
        """True if the modified rule is scale-free."""
        return scale_free(self.rule)

    @property
    def averages_memory(self) -> bool:
        """True if the memory of the modified rule is a mean."""
        return averages_memory(self.rule)
