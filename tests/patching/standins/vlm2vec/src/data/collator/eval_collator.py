from src.model.processor import process_vlm_inputs_fns


class MultimodalEvalDataCollator:
    def __init__(self, processor, model_args, data_args, encode_side):
        self.processor, self.model_args = processor, model_args
        self.side = "query" if encode_side == "qry" else "cand"

    def __call__(self, examples):
        inputs = {
            "text": [e[f"{self.side}_text"] for e in examples],
            "images": [e[f"{self.side}_image"] for e in examples],
        }
        process_fn = process_vlm_inputs_fns[self.model_args.model_backbone]
        return process_fn(inputs, self.processor), [e["dataset_infos"] for e in examples]
