"""The statements in the contract's order: number, a letter if a number has several statements, and one sentence."""

CATALOG = {
    "C0": "20 steps in float64 follow the paper: w is updated with the gradient at w + rho g/‖g‖",
    "C1a": "After loading a checkpoint, the learning-rate schedule still acts on the weights",
    "C1b": "A learning rate written into the groups of the optimizer that takes the steps is used, also after loading",
    "C2a": "A run resumes bit for bit from its checkpoint, momentum included (SGD with momentum, and AdamW)",
    "C2b": "A run of a cheaper method resumes from its checkpoint, including its memory and step counter",
    "C2c": "torch.load(weights_only=True) reads the optimizer's checkpoint",
    "C2d": "Switching to SAM late: a checkpoint of the plain base optimizer loads, with its momentum",
    "C3": "A copy (copy.deepcopy, pickle) of model and optimizer takes the same next step",
    "C4a": "Step hooks run once per step",
    "C4b": "Learning-rate schedulers (LambdaLR, OneCycleLR) give no warning",
    "C5": "Adadelta, which has a rho of its own, keeps it",
    "C6a": "With lr = 0, a step leaves every float32 weight unchanged, bit for bit",
    "C6b": "With lr = 0, a step leaves every bfloat16 weight unchanged, bit for bit",
    "C6c": "The weights stay in the same storage",
    "C7a": "An exception or Ctrl-C in the second pass leaves the weights at w",
    "C7b": "With lr = 0, a parameter that has a gradient in the first pass only does not change",
    "C7c": "With lr = 0, a parameter that has a gradient in the second pass only does not change",
    "C8a": "A step makes two passes and returns the loss at w",
    "C8b": "A method documented as cheaper makes no more passes than documented",
    "C9a": "step(closure) with torch.optim's ordinary closure, and nothing before it, is SAM's step or an error",
    "C9b": "A radius that is negative, NaN or infinite is an error",
    "C10a": "rho = 0 is the base optimizer bit for bit, with BatchNorm in the model",
    "C10b": "rho = 0 is the base optimizer bit for bit, with BatchNorm and dropout in the model",
    "C11a": "If all gradients are zero, the weights stay finite",
    "C11b": "maximize=True of the base reverses the perturbation, too",
    "C11c": "The perturbation has length rho for float16 gradients whose norm overflows in float16",
    "C11d": "The perturbation has length rho for 50 million float32 weights",
    "C14a": "BatchNorm's running mean and variance are those of one ordinary pass per step",
    "C14b": "BatchNorm's counter, and the averages of BatchNorm(momentum=None), are those of one pass per step",
    "C14c": "InstanceNorm's running statistics are those of one ordinary pass per step",
    "C14d": "An exception in the second pass leaves no layer disabled: BatchNorm continues to update its statistics",
    "C15a": "Both passes use the same dropout masks",
    "C15b": "A step leaves the random generator in the same state as an ordinary step",
    "C16": "With one autocast region around the whole step, the second pass computes with w + e",
    "C17a": "With a loss scaler as documented, the run is the one without it, and an overflow changes no weight",
    "C17b": "scaler.step(optimizer, closure), which torch does not support, is an error and no wrong update",
    "C17c": "scaler.step(optimizer, closure) after a first backward is an error and no wrong update",
    "C18": "One batch whose gradients are NaN does not ruin the run (torch's own optimizers do not promise that)",
    "C19": "Micro-batches are equivalent to one large batch",
    "C20": "Clipping, where documented, bounds the update gradient",
    "C25": "On a GPU, a step never waits for the device (checked with fake CUDA tensors, no GPU needed)",
    "C26": "A compiled model is not compiled again after the first step",
    "C27": "On a GPU, around a fused base, the number of operations does not grow with the number of tensors",
    "C28a": "A momentum encoder that the forward moves is that of one pass per step",
    "C28b": "A buffer that the forward resizes is that of one pass per step",
    "C28c": "Both passes use the same noise from a torch.Generator that the model holds",
    "C29": "After Ctrl-C in the second pass, the next step is that of a run without the interrupted step",
    "C30": "An engine that copies the optimizer's attributes, as Lightning Fabric does, takes the same steps",
    "C31": "train() and eval() of the optimizer reach a base that has them, as schedule-free optimizers do",
    "C32": "Statistics of a second network in the loss are those of one pass per step, or a warning names it",
    "C33a": "A closure that returns the loss without a backward pass trains, or is an error",
    "C33b": "A second pass that uses the graph of the first is an error or a warning",
    "C34": "With activation checkpointing (both kinds), a step is the one without it",
    "C35": "Assigning optimizer.rho sets the radius, or is an error",
    "C36": "A perturbation that rounding removes is noticed: by a warning, an error or the optimizer's report",
    "C37": "Type checkers read its annotations: the package has a py.typed file",
}

REMARKS = {
    "C1b": "The value is written to `param_groups` of the object whose `step` is called. It is ignored if these are "
    "not the groups of the base.",
    "C2a": "4 steps, save, load, 5 more steps, compared with 9 uninterrupted steps. The checkpoint is the "
    "`state_dict()` of the optimizer that takes the steps, unless the documentation shows another way, and that of the "
    "base, if the user builds it.",
    "C2b": "The method is LookSAM, SAM at every k-th step, or SAM in the last part of the run, whichever exists.",
    "C2d": "No other implementation documents this. The checkpoint is loaded into the base before it is wrapped, or, "
    "if the implementation builds the base itself, into that base.",
    "C4a": "The hooks are registered on the object that the documentation passes to schedulers.",
    "C5": "The decay is computed from the running average after one step.",
    "C6a": "A million weights of size 0.05, rho = 0.05. w + e - e is not w in floating point.",
    "C7a": "The cell shows the distance of the weights from w after the exception, in units of rho. If the user writes "
    "the loop of both passes, no optimizer can catch the exception.",
    "C7b": "Three steps; a tolerance of 1e-6, because rounding is the subject of C6.",
    "C8b": "Passes per step over 20 steps, k = 5 (for a tail: the last fifth), compared with the implementation's own "
    "documentation of the method.",
    "C9a": "Where the documentation requires a first backward before `step(closure)`, this shows what happens without "
    "it.",
    "C9b": "The error may be raised at construction or at the first step.",
    "C10a": "Six steps, compared with the base optimizer in the same loop.",
    "C11a": "The weights are at a minimum of the loss.",
    "C11c": "100,000 equal gradients of 300 in float16. Tolerance 5 %.",
    "C11d": "Equal gradients; one thread. A float32 sum of 50 million squares loses digits.",
    "C14a": "Three steps with lr = 0, compared with ordinary ones; an implementation's own BatchNorm helpers are used.",
    "C14d": "Where the helpers disable BatchNorm, it stays disabled until they are called again, also in a model that "
    "is saved or used after the exception.",
    "C15a": "The paper does not require this. With different masks the two gradients are those of different functions.",
    "C15b": "Compared with an ordinary step of the base. If it holds, a run with rho = 0 draws the same numbers as a "
    "run without SAM.",
    "C16": "torch's documentation recommends a region around the forward only. Around the whole step, autocast caches "
    "its casts of w, so the second pass computes with w, and SAM is silently disabled.",
    "C17b": "The cell shows the size of the update in units of the right one; the loss scale is 1,024. According to "
    "torch's documentation, closures are not supported with a scaler; the scaler raises an error only if the closure "
    "is passed by name.",
    "C17c": "The scaler unscales the gradients that it finds, and the closure's passes then write scaled ones again.",
    "C18": "torch's own optimizers would be ruined as well. optax has a documented guard, `apply_if_finite`, which is "
    "used; it is used for C11a as well.",
    "C25": "Fake CUDA tensors raise an error where a value is read on the host.",
    "C27": "The cell shows the operations of a step minus those of the base's own step, with `AdamW(fused=True)`. "
    "Around a base that is not fused, Steppe's check for NaN adds one operation per tensor, because torch has no "
    "multi-tensor kernel for it.",
    "C28a": "Three steps with lr = 0, compared with ordinary ones.",
    "C29": "The gradients are cleared after the exception. If the user writes the loop of both passes, no optimizer "
    "can catch the exception, but the next step can notice it.",
    "C30": "Five steps with momentum through an object of a derived class with the same `__dict__`, whose `step` calls "
    "the optimizer's.",
    "C32": "The second network is in training mode and has BatchNorm; it is not in `model=`.",
    "C31": "The calls that reach the base are counted; for HeavyBall, with its own schedule-free optimizer.",
    "C33a": "`step(closure)` with nothing before it.",
    "C33b": "The loss is computed once and its graph retained, so both gradients are those of w, and SAM is silently "
    "disabled. The weights change in between, but a product of weights and data does not notice that.",
    "C34": "Three steps in float64.",
    "C35": "Other implementations document `param_groups` as the place of the radius; the assignment then has no "
    "effect. Steppe's groups have the radius as well.",
    "C36": "A radius of 1e-12 and weights of size 1 in float32, 20 steps.",
}
