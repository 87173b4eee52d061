"""Stand-in for upstream's evaluation script, with its loops and files; random text and patches."""

import json
import os
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import torch
from src.data.collator.eval_collator import MultimodalEvalDataCollator
from src.model.model import MMEBModel
from src.model.processor import QWEN2_VL, load_processor
from src.utils.basic_utils import batch_to_device, print_master
from src.utils.eval_utils.metrics import RankingMetrics
from torch.utils.data import DataLoader


def encode_embeddings(model, loader, training_args, model_args, encode_side, description=""):
    local_embeds, local_gt_infos = [], []
    model.eval()
    with torch.no_grad():
        for inputs, dataset_info in loader:
            inputs = batch_to_device(inputs, training_args.device)
            with torch.autocast(enabled=True, dtype=torch.bfloat16, device_type="cuda"):
                if encode_side == "qry":
                    reps = model(qry=inputs)["qry_reps"].detach()
                    local_gt_infos.extend(dataset_info)
                else:
                    reps = model(tgt=inputs)["tgt_reps"].detach()
                    local_gt_infos.extend(info["cand_name"] for info in dataset_info)
            local_embeds.append(reps)
    return torch.cat(local_embeds, dim=0).cpu().float().numpy(), local_gt_infos


def items(count):
    """Queries and candidates: text, images of several sizes and a video among them."""
    shapes = (None, (1, 4, 4), None, (1, 2, 6), (2, 2, 4))
    return [
        {
            "query_text": " ".join(f"word{n * k % 7}" for k in range(1, 3 + n % 5)),
            "query_image": shapes[n % 5],
            "cand_text": f"candidate {n} " + "more " * (n % 3),
            "cand_image": shapes[(n + 2) % 5],
            "dataset_infos": {"cand_name": f"c{n}", "label_name": f"c{n}"},
        }
        for n in range(count)
    ]


def main():
    folder, output = sys.argv[1:3]
    model_args = SimpleNamespace(
        model_name=folder,
        model_backbone=QWEN2_VL,
        pooling="eos",
        normalize=True,
        temperature=0.02,
    )
    training_args = SimpleNamespace(device="cpu", per_device_eval_batch_size=4)
    processor = load_processor(model_args)
    model = MMEBModel.load(model_args, is_trainable=False, processor=processor)
    model.eval()
    model = model.to(training_args.device)
    os.makedirs(output, exist_ok=True)
    dataset, files = items(11), {}
    for side in ("qry", "cand"):
        collator = MultimodalEvalDataCollator(processor, model_args, None, side)
        loader = DataLoader(
            dataset, batch_size=training_args.per_device_eval_batch_size, collate_fn=collator
        )
        embeds, infos = encode_embeddings(model, loader, training_args, model_args, side)
        files[side] = os.path.join(output, f"toy_{'qry' if side == 'qry' else 'tgt'}")
        with open(files[side], "wb") as f:
            named = embeds if side == "qry" else dict(zip(infos, embeds, strict=True))
            pickle.dump(named, f)
        if side == "qry":
            gt_infos = infos
    with open(files["qry"], "rb") as f:
        qry_embeds = pickle.load(f)
    with open(files["cand"], "rb") as f:
        cand_embed_dict = pickle.load(f)
    pred_dicts = []
    cand_keys = list(cand_embed_dict.keys())
    cand_embeds = np.stack([cand_embed_dict[key] for key in cand_keys])
    cosine_scores = np.dot(qry_embeds, cand_embeds.T)
    ranked_candids = np.argsort(-cosine_scores, axis=1)
    for ranked_candid, gt_info in zip(ranked_candids, gt_infos, strict=True):
        pred_dicts.append(
            {
                "prediction": [cand_keys[i] for i in ranked_candid],
                "label": [gt_info["label_name"]],
                "rel_scores": None,
            }
        )
    score_dict = RankingMetrics().evaluate(pred_dicts)
    print_master(score_dict)
    with open(os.path.join(output, "toy_score.json"), "w") as f:
        json.dump(score_dict, f, indent=4)
    with open(os.path.join(output, "toy_pred.jsonl"), "w") as f:
        f.writelines(json.dumps(pred) + "\n" for pred in pred_dicts)


if __name__ == "__main__":
    main()
