"""The demonstrations of fine-tuning, a few steps of each: rows, commands, table and curves."""

import json
import re

import finetune_shapes as demo
import pytest

from minivlm.training.rows import read_rows


@pytest.mark.parametrize("name", demo.DEMOS)
def test_each_runs_from_rows_to_a_table(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo.torch, "set_num_threads", lambda _: None)
    small = ["--steps", "2", "--rows", "2", "--count", "1", "--work", str(tmp_path)]
    curves = ["--plot", str(tmp_path / "curves.png")] if name == "json" else []
    if curves:
        pytest.importorskip("matplotlib")
    demo.main([name, *small, *curves])
    out = capsys.readouterr().out
    columns = {"nf4": 4}.get(name, 2)
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len(table) == 4 + (name == "few-shot")
    assert all(len(re.findall(r"\d %", line)) == columns for line in table[2:])
    assert f"$ minivlm finetune {tmp_path / name / 'rows.jsonl'}" in out
    log = (tmp_path / name / "adapter" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["number"] for line in log] == [1, 2]
    assert len(read_rows(tmp_path / name / "rows.jsonl", tmp_path / name)) == 4
    assert not curves or (tmp_path / "curves.png").stat().st_size > 1000
    with pytest.raises(SystemExit):  # a second run needs a folder of its own
        demo.main([name, *small])


def test_the_new_tasks_have_one_right_answer():
    """JSON of the leftmost shape, clearly in one quarter; one hexagon in each scene, and it is asked for."""
    for number in range(30):
        scene, _, answer = demo.json_case(1000 * number)
        found = json.loads(answer)
        assert (found["shape"], found["colour"]) == (scene.shapes[0].kind, scene.shapes[0].colour)
        assert demo.right(answer.replace('"', ' " '), answer)
        assert not demo.right(answer.replace(found["where"], "middle"), answer)
        assert not demo.right(answer[:-1], answer)
        scene, _, answer = demo.hexagon_case(1000 * number)
        assert [shape.kind for shape in scene.shapes].count("hexagon") == answer.count("hexagon") == 1


def test_measured_scenes_are_not_trained_on():
    trained = {demo.json_case(1000 * number)[0].seed for number in range(50)}
    assert max(trained) < demo.HELD_OUT_SEED <= demo.json_case(demo.UNSEEN)[0].seed
