def split_and_process_vlm_inputs(model_input, chunk_size):
    ((side, values),) = model_input.items()
    count = len(values["input_ids"])
    parts = []
    for start in range(0, count, chunk_size):
        rows = slice(start, start + chunk_size)
        parts.append({side: {key: value[rows] for key, value in values.items()}})
    return parts


def get_dense_rep(x):
    return x["tgt_reps"] if x["qry_reps"] is None else x["qry_reps"]
