"""What the command `curriculum` takes beside its recipe."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class CurriculumRunConfig:
    """The run of a curriculum; its stages are in --config."""

    set: list[str] = field(default_factory=list)
    """Changes of the recipe, each as STAGE.SECTION.KEY=VALUE, defaults.SECTION.KEY=VALUE or save=FOLDER; the value is
    YAML."""
    dry_run: bool = False
    """Check all stages, print the plan and what each stage comes to, and end."""
    dry_run_world_size: int | None = None
    """Number of processes that --dry-run reckons with; those of the launcher, or as few as each stage needs, when it is
    not given."""
    status: bool = False
    """Print where the run stands, from its files, and end. A run that is at work is not disturbed."""
    redo_from: str | None = None
    """Do this stage again, and all that came after it; what they left is set aside in save/discarded."""
