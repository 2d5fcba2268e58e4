"""Put the tensors of train_mtp.py into a checkpoint's file, in place: names, types, shapes and places stay.

    python merge_mtp.py mtp.safetensors ../model.safetensors
"""
import json, struct, sys


def read(path):
    data = bytearray(open(path, "rb").read())
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    return data, 8 + size, header


def main():
    source, source_begin, tensors = read(sys.argv[1])
    target, target_begin, places = read(sys.argv[2])
    for name, tensor in tensors.items():
        place = places[name]
        assert (tensor["dtype"], tensor["shape"]) == (place["dtype"], place["shape"]), name
        (begin, end), (to_begin, to_end) = tensor["data_offsets"], place["data_offsets"]
        target[target_begin + to_begin : target_begin + to_end] = source[source_begin + begin : source_begin + end]
    open(sys.argv[2], "wb").write(target)
    print(f"{len(tensors)} of {len(places)} tensors")


main()
