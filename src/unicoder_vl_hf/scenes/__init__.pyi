from .answers import build_vqa_scenes as build_vqa_scenes
from .expressions import build_grounding_scenes as build_grounding_scenes
from .hypotheses import build_entailment_scenes as build_entailment_scenes
from .pairs import build_nlvr2_scenes as build_nlvr2_scenes
from .questions import build_vcr_scenes as build_vcr_scenes
from .world import (
    Scene as Scene,
    SceneObject as SceneObject,
    build_scenes as build_scenes,
    render_scene as render_scene,
    sample_scene as sample_scene,
    scene_captions as scene_captions,
)
