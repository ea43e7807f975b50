"""Questions with short answers about scenes: true, and even for every text, so that none is answered without seeing."""

import json
from collections import Counter, defaultdict

import pytest

pytest.importorskip("PIL")

from unicoder_vl_hf import RegionStore
from unicoder_vl_hf.scenes.answers import CHANCE, build_vqa_scenes, sample_asked_scene
from unicoder_vl_hf.scenes.world import COLOURS, plural, scene_tokenizer

ASKED = [sample_asked_scene(index) for index in range(2000)]


def answer(scene, form, question):
    """The answer, by the words of the question and what the scene holds."""
    words = question.removesuffix(" ?").split()
    names = {word: shape for shape in {thing.shape for thing in scene.objects} for word in (shape, plural(shape))}
    counts = Counter(thing.shape for thing in scene.objects)
    if form == "colour":
        (thing,) = [thing for thing in scene.objects if thing.shape == words[-1]]
        return thing.colour
    if form == "count":
        return str(counts[names.get(words[2])])
    if form == "existence":
        return "yes" if (words[-2], words[-1]) in {(thing.colour, thing.shape) for thing in scene.objects} else "no"
    first, second = counts[names.get(words[3])], counts[names.get(words[5])]
    assert first != second
    return "yes" if first > second else "no"


def test_every_answer_is_true():
    for scene, asked in ASKED:
        for form, (question, given) in asked.items():
            assert answer(scene, form, question) == given, (scene, question)


def test_each_form_has_its_answers_equally_often():
    for form, chance in CHANCE.items():
        counts = Counter(asked[form][1] for _, asked in ASKED if form in asked)
        assert len(counts) == round(1 / chance)
        expected = sum(counts.values()) * chance
        assert all(abs(count - expected) < 4 * expected**0.5 for count in counts.values()), (form, counts)


@pytest.mark.parametrize("form", CHANCE)
def test_no_text_tells_its_answer(form):
    """The best guess by the text, learned from half of the scenes, is at chance on the other half."""
    by_text = defaultdict(Counter)
    for _, asked in ASKED[:1000]:
        if form in asked:
            by_text[asked[form][0]][asked[form][1]] += 1
    right = [
        by_text[asked[form][0]].most_common(1)[0][0] == asked[form][1]
        for _, asked in ASKED[1000:]
        if form in asked and by_text[asked[form][0]]
    ]
    spread = (CHANCE[form] * (1 - CHANCE[form]) / len(right)) ** 0.5
    assert sum(right) / len(right) < CHANCE[form] + 4 * spread


def test_what_is_asked_for_is_there_in_part_where_the_answer_is_no():
    for scene, asked in ASKED[:300]:
        words = asked["existence"][0].split()
        assert words[-2] in {thing.shape for thing in scene.objects}


def test_texts_are_of_the_vocabulary():
    tokenizer = scene_tokenizer()
    texts = [question for _, asked in ASKED[:100] for question, _ in asked.values()]
    assert tokenizer.unk_token_id not in [token for ids in tokenizer(texts)["input_ids"] for token in ids]
    assert set(COLOURS) >= {asked["colour"][1] for _, asked in ASKED}


def test_a_built_world_is_in_vqas_files(tmp_path):
    folder = build_vqa_scenes(tmp_path / "world", num_train=3, num_val=2, num_test=1)
    assert len(RegionStore(folder / "regions")) == 6 == len(list((folder / "images").iterdir()))
    questions, annotations = (
        json.loads((folder / f"train_{kind}.json").read_text())[kind] for kind in ("questions", "annotations")
    )
    assert [item["question_id"] for item in questions] == list(range(1, len(questions) + 1))
    for question, item in zip(questions, annotations, strict=True):
        _, asked = sample_asked_scene(question["image_id"] - 1_000_000)
        assert asked[item["question_type"]] == (question["question"], item["multiple_choice_answer"])
        assert [each["answer"] for each in item["answers"]] == [item["multiple_choice_answer"]] * 10
    assert not (folder / "test_annotations.json").exists()


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split is 'dev'"):
        sample_asked_scene(0, "dev")
