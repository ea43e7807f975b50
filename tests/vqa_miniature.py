"""Small files of VQA, OK-VQA and GQA with the oddities of their formats, written without a line of ours."""

import json
from pathlib import Path

# Answers of ten annotators, as VQA has them: of one mind, divided, with marks, articles, numbers and nothing at all.
GIVEN = {
    458752000: ["net"] * 10,
    458752001: ["pitcher"] * 4 + ["The pitcher"] * 2 + ["catcher"] * 3 + [""],
    458752002: ["2"] * 3 + ["two"] * 6 + ["2."],
    262146000: ["yes"] * 9 + ["no"],
    393226000: ["don't know"] + ["1,000"] * 2 + ["o'clock"] * 3 + ["black/white"] * 4,
}
TYPES = {
    458752000: ("what is this", "other"),
    458752001: ("what", "other"),
    458752002: ("how many", "number"),
    262146000: ("is the", "yes/no"),
    393226000: ("none of the above", "other"),
}


def vqa_questions() -> dict:
    items = [
        {"image_id": question_id // 1000, "question": f"Question {question_id}?", "question_id": question_id}
        for question_id in GIVEN
    ]
    beside = {"info": {"version": "2.0"}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {}}
    return {**beside, "data_subtype": "val2014", "questions": items}


def vqa_annotations() -> dict:
    """In another order than the questions."""
    items = []
    for question_id, given in reversed(GIVEN.items()):
        question_type, answer_type = TYPES[question_id]
        answers = [
            {"answer": answer, "answer_confidence": "maybe", "answer_id": number}
            for number, answer in enumerate(given, 1)
        ]
        beside = {"question_type": question_type, "answer_type": answer_type, "answers": answers}
        most = max(given, key=given.count)
        items.append(
            {"question_id": question_id, "image_id": question_id // 1000, "multiple_choice_answer": most, **beside}
        )
    return {"info": {}, "data_type": "mscoco", "data_subtype": "val2014", "license": {}, "annotations": items}


def ok_vqa_annotations() -> dict:
    """Without a most frequent answer, and with raw ones beside those that count."""
    content = vqa_annotations()
    for item in content["annotations"]:
        del item["multiple_choice_answer"]
        item["confidence"] = 3
        for answer in item["answers"]:
            answer["raw_answer"] = answer["answer"] + "s"
    return content


def gqa_questions() -> dict:
    types = {"detailed": "existC", "semantic": "obj"}
    return {
        "201307251": {
            "imageId": "2354786", "question": "Is the sky dark?", "answer": "yes", "fullAnswer": "Yes, it is dark.",
            "isBalanced": True, "groups": {}, "entailed": [], "equivalent": ["201307251"],
            "types": types | {"structural": "verify"}, "semantic": [], "semanticStr": "", "annotations": {},
        },
        "201640614": {
            "imageId": "n161313", "question": "Who is wearing the dress?", "answer": "the woman", "isBalanced": True,
            "types": types | {"structural": "query"},
        },
    }  # fmt: skip


def write(folder: Path) -> Path:
    contents = {
        "questions.json": vqa_questions(),
        "annotations.json": vqa_annotations(),
        "ok_annotations.json": ok_vqa_annotations(),
        "gqa.json": gqa_questions(),
        "gqa_test.json": {
            name: {field: item[field] for field in ("imageId", "question")} for name, item in gqa_questions().items()
        },
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    return folder
