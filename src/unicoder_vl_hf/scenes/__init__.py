"""The rendered world and the questions about it."""

from typing import TYPE_CHECKING

from ..lazy import lazily

if TYPE_CHECKING:
    from .questions import build_vcr_scenes
    from .world import Scene, SceneObject, build_scenes, render_scene, sample_scene, scene_captions

__getattr__, __dir__ = lazily(
    __name__,
    {
        "questions": ["build_vcr_scenes"],
        "world": ["Scene", "SceneObject", "build_scenes", "render_scene", "sample_scene", "scene_captions"],
    },
)

__all__ = ["Scene", "SceneObject", "build_scenes", "build_vcr_scenes", "render_scene", "sample_scene", "scene_captions"]
