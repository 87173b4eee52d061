"""Rows of a dataset to one batch of model inputs."""

from dataclasses import dataclass
from typing import Any

from PIL import Image

from src.model.processor import VLM_IMAGE_TOKENS, VLM_VIDEO_TOKENS

GENERATION_PROMPT = "Represent the above input as an embedding with <gen_emb>."


@dataclass
class MultimodalEvalDataCollator:
    processor: Any
    model_args: Any
    data_args: Any
    encode_side: str

    def _get_batch_inputs(self, batch, text_keyname, image_keyname):
        backbone = self.model_args.model_backbone
        messages, images = [], []
        for example in batch:
            for text, visual in zip(example[text_keyname], example[image_keyname], strict=True):
                path = visual["paths"][0] if visual else None
                images.append(Image.open(path) if path else Image.new("RGB", (56, 56), "white"))
                for token in (VLM_IMAGE_TOKENS[backbone], VLM_VIDEO_TOKENS[backbone]):
                    text = text.replace(token, "")
                said = text.strip() + "\n<disc_emb>\n" + GENERATION_PROMPT
                content = [{"type": "image", "image": path}, {"type": "text", "text": said}]
                messages.append([{"role": "user", "content": content}])
        return {"messages": messages, "images": images}

    def __call__(self, examples):
        side = "query" if self.encode_side == "qry" else "cand"
        inputs = self._get_batch_inputs(examples, f"{side}_text", f"{side}_image")
        texts = [
            self.processor.apply_chat_template(m, tokenize=False, add_generation_prompt=True)
            for m in inputs["messages"]
        ]
        processed = self.processor(
            text=texts, images=inputs["images"], videos=None, padding=True, return_tensors="pt"
        )
        return processed, [example["dataset_infos"] for example in examples]
