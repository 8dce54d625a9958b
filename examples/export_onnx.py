"""A pruned network as an ONNX file, and in ONNX Runtime. Needs pip install 'singe[onnx]'."""

import onnxruntime
import torch
from torch.utils.data import DataLoader

import singe
from singe.demo import DigitNet, digits, train


def main(file="digits.onnx", width=16, epochs=6, rho=0.5, steps=1000):
    torch.manual_seed(0)
    training, test = digits()
    loader = DataLoader(training, batch_size=64, shuffle=True)
    result = singe.prune(train(DigitNet(width), loader, epochs), loader, rho, finetune=singe.FineTune(steps=steps))

    x, y = test.tensors
    singe.export_onnx(result.model, x[:4], file)  # the batch is dynamic: any number of images may go through

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"input": x.numpy()})
    accuracy = (logits.argmax(1) == y.numpy()).mean()
    print(f"{file}: {result.params_after:,} parameters, {accuracy:.1%} of {len(x)} images right")
    return accuracy


if __name__ == "__main__":
    main()
