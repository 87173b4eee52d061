from .modeling_qwen2_vl import Qwen2VLForConditionalGeneration

__all__ = ["Qwen2VLForConditionalGeneration"]
