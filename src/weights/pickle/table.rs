//! From the value of a pickle to the table of its tensors: names, types, shapes, strides and where they are stored.
//!
//! Follows what `torch.save` writes for a tensor: `_rebuild_tensor_v2(storage, offset, size, stride, …)`, the storage being
//! `("storage", torch.FloatStorage, entry, device, count)`.

use candle_core::pickle::Object;
use safetensors::Dtype;

use super::Reason;

/// Where generators and trainers put the state dict, best first.
const WRAPPERS: [&str; 4] = ["params_ema", "params", "state_dict", "string_to_param"];

/// A type of storage.
#[derive(Debug, Clone, Copy)]
pub(super) struct Storage {
    pub(super) name: &'static str,
    /// Bytes of a value.
    pub(super) width: usize,
    /// `None`: not for computing.
    pub(super) dtype: Option<Dtype>,
}

const STORAGES: &[Storage] = &[
    storage("FloatStorage", 4, Some(Dtype::F32)),
    storage("HalfStorage", 2, Some(Dtype::F16)),
    storage("BFloat16Storage", 2, Some(Dtype::BF16)),
    storage("DoubleStorage", 8, None),
    storage("LongStorage", 8, None),
    storage("IntStorage", 4, None),
    storage("ShortStorage", 2, None),
    storage("CharStorage", 1, None),
    storage("ByteStorage", 1, None),
    storage("BoolStorage", 1, None),
];

const fn storage(name: &'static str, width: usize, dtype: Option<Dtype>) -> Storage {
    Storage { name, width, dtype }
}

/// A tensor as the pickle describes it; nothing is checked against the file yet.
pub(super) struct Info {
    pub(super) storage: Storage,
    /// Name of the storage's entry below `data/`.
    pub(super) entry: String,
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    pub(super) stride: Vec<usize>,
}

/// The tensors of a state dict; entries that are no tensors are left out.
pub(super) fn tensors(value: &Object) -> Result<Vec<(String, Info)>, Reason> {
    let Object::Dict(top) = value else {
        return Err("it holds no state dict".into());
    };
    let inner = WRAPPERS.iter().find_map(|wrapper| {
        let named = |key: &Object| matches!(key, Object::Unicode(key) if key == wrapper);
        let (_, value) = top.iter().find(|(key, _)| named(key))?;
        match contents(value) {
            Object::Dict(inner) => Some(inner),
            _ => None,
        }
    });
    let mut found = Vec::new();
    for (key, value) in inner.unwrap_or(top) {
        let Object::Unicode(key) = key else { continue };
        if let Some(arguments) = rebuilt(value) {
            let info = info(arguments)
                .ok_or_else(|| format!("tensor `{key}` is not described as `torch.save` does"))?;
            found.push((key.clone(), info?));
        }
    }
    Ok(found)
}

/// A dict with attributes (an `OrderedDict` with `_metadata`) without them; of a `ParameterDict` the dict inside.
fn contents(value: &Object) -> &Object {
    match value {
        Object::Build { callable, args } => match (&**callable, &**args) {
            (Object::Dict(_), _) => callable,
            (_, Object::Dict(attributes)) => attributes
                .iter()
                .find(|(key, _)| matches!(key, Object::Unicode(key) if key == "_parameters"))
                .map_or(args, |(_, parameters)| contents(parameters)),
            _ => callable,
        },
        other => other,
    }
}

/// The arguments of `_rebuild_tensor_v2`, also within a parameter.
fn rebuilt(value: &Object) -> Option<&[Object]> {
    let (name, arguments) = call(value)?;
    match (name, arguments) {
        ("_rebuild_tensor_v2", arguments) => Some(arguments),
        ("_rebuild_parameter", [tensor, ..]) => match call(tensor)? {
            ("_rebuild_tensor_v2", arguments) => Some(arguments),
            _ => None,
        },
        _ => None,
    }
}

fn call(value: &Object) -> Option<(&str, &[Object])> {
    let Object::Reduce { callable, args } = value else {
        return None;
    };
    match (&**callable, &**args) {
        (Object::Class { class_name, .. }, Object::Tuple(args)) => Some((class_name, args)),
        _ => None,
    }
}

/// `None`: not of the form that it must have.
fn info(arguments: &[Object]) -> Option<Result<Info, Reason>> {
    let [Object::PersistentLoad(place), offset, size, stride, ..] = arguments else {
        return None;
    };
    let Object::Tuple(place) = &**place else {
        return None;
    };
    let [
        _,
        Object::Class { class_name, .. },
        Object::Unicode(entry),
        ..,
    ] = place.as_slice()
    else {
        return None;
    };
    let (offset, shape, stride) = (number(offset)?, numbers(size)?, numbers(stride)?);
    let Some(storage) = STORAGES.iter().find(|known| known.name == class_name) else {
        return Some(Err(format!("it holds tensors of type `{class_name}`")));
    };
    Some(Ok(Info {
        storage: *storage,
        entry: entry.clone(),
        offset,
        shape,
        stride,
    }))
}

fn number(value: &Object) -> Option<usize> {
    match value {
        Object::Int(number) => usize::try_from(*number).ok(),
        Object::Long(number) => usize::try_from(*number).ok(),
        _ => None,
    }
}

fn numbers(value: &Object) -> Option<Vec<usize>> {
    match value {
        Object::Tuple(values) => values.iter().map(number).collect(),
        _ => None,
    }
}
