//! What a pickle may say before anything reads it: the opcodes and names that `torch.save` writes for a state dict.
//!
//! Each value on the stack is followed as a count of nodes and a depth, since what reads it afterwards copies a value each time
//! it is remembered or recalled, and frees it recursively. Opcodes follow Python's `pickletools`.

use std::collections::HashMap;

use super::Reason;

/// Bytes a pickle may have; that of a checkpoint of 10,000 tensors has 2 MB.
const BYTES: usize = 16 << 20;
/// Nodes of all values ever made and copied.
const NODES: u64 = 1 << 21;
/// Levels of nesting.
const DEPTH: u32 = 64;

/// Modules and names that a state dict consists of.
const GLOBALS: &[(&str, &str)] = &[
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    // Around them in embeddings and in what a trainer saves; nothing is made of them.
    ("torch.nn.modules.container", "ParameterDict"),
    ("__builtin__", "set"),
    (
        "pytorch_lightning.callbacks.model_checkpoint",
        "ModelCheckpoint",
    ),
];

/// What is known of a value.
#[derive(Clone, Copy, Default)]
struct Value {
    nodes: u64,
    depth: u32,
}

struct Guard<'a> {
    rest: &'a [u8],
    stack: Vec<Value>,
    marks: Vec<usize>,
    memo: HashMap<u32, Value>,
    nodes: u64,
}

/// Refuses what is not a state dict's pickle.
pub(super) fn check(program: &[u8]) -> Result<(), Reason> {
    if program.len() > BYTES {
        return Err(format!(
            "its pickle has {} bytes; the limit is {BYTES}",
            program.len()
        ));
    }
    let mut guard = Guard {
        rest: program,
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        nodes: 0,
    };
    while guard.step()? {}
    Ok(())
}

impl<'a> Guard<'a> {
    /// Follows one opcode; `false` at the end.
    fn step(&mut self) -> Result<bool, Reason> {
        match self.take(1)?[0] {
            0x80 => drop(self.take(1)?),
            b'.' => return Ok(false),
            b'c' => self.global()?,
            b'N' | 0x88 | 0x89 | b')' | b'}' | b']' => self.push(Value::default(), 1)?,
            b'K' => self.leaf(1)?,
            b'M' => self.leaf(2)?,
            b'J' => self.leaf(4)?,
            b'G' => self.leaf(8)?,
            0x8a => self.long()?,
            b'X' => {
                let len = self.number(4)? as usize;
                self.take(len)?;
                let nodes = 1 + len as u64 / 32;
                self.push(Value { nodes, depth: 0 }, nodes)?;
            }
            b'(' => {
                self.marks.push(self.stack.len());
                self.push(Value::default(), 1)?;
            }
            b't' => {
                let value = self.above_mark()?;
                self.push(value, 1)?;
            }
            0x85 | b'Q' => self.join(1)?,
            0x86 | b'R' | b'b' | 0x81 => self.join(2)?,
            0x87 => self.join(3)?,
            b'a' => {
                let item = self.joined(1)?;
                self.extend(item)?;
            }
            b's' => {
                let item = self.joined(2)?;
                self.extend(item)?;
            }
            b'u' | b'e' => {
                let items = self.above_mark()?;
                self.extend(items)?;
            }
            b'q' => self.put(1)?,
            b'r' => self.put(4)?,
            b'h' => self.get(1)?,
            b'j' => self.get(4)?,
            other => {
                return Err(format!(
                    "its pickle holds opcode {other:#04x}, which `torch.save` does not write"
                ));
            }
        }
        Ok(true)
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], Reason> {
        let (taken, rest) = self
            .rest
            .split_at_checked(count)
            .ok_or("its pickle is truncated")?;
        self.rest = rest;
        Ok(taken)
    }

    /// A little-endian number of `bytes` bytes.
    fn number(&mut self, bytes: usize) -> Result<u32, Reason> {
        let taken = self.take(bytes)?;
        Ok(taken
            .iter()
            .rev()
            .fold(0, |number, byte| number << 8 | u32::from(*byte)))
    }

    fn leaf(&mut self, bytes: usize) -> Result<(), Reason> {
        self.take(bytes)?;
        self.push(Value::default(), 1)
    }

    fn long(&mut self) -> Result<(), Reason> {
        let len = self.take(1)?[0];
        if len > 8 {
            return Err(format!("its pickle holds a number of {len} bytes"));
        }
        self.leaf(len.into())
    }

    fn global(&mut self) -> Result<(), Reason> {
        let module = self.line()?;
        let name = self.line()?;
        let storage = module == "torch" && name.ends_with("Storage");
        if storage || GLOBALS.contains(&(module, name)) {
            return self.push(Value::default(), 1);
        }
        Err(format!(
            "its pickle calls for `{}.{}`, which weights do not need",
            module.escape_debug(),
            name.escape_debug()
        ))
    }

    fn line(&mut self) -> Result<&'a str, Reason> {
        let rest = self.rest;
        let end = rest.iter().take(256).position(|byte| *byte == b'\n');
        let line = self.take(end.ok_or("its pickle names something too long")?)?;
        self.take(1)?;
        std::str::from_utf8(line).map_err(|_| "its pickle names something that is no text".into())
    }

    /// Pushes a value of which `made` nodes did not exist before.
    fn push(&mut self, value: Value, made: u64) -> Result<(), Reason> {
        self.nodes = self.nodes.saturating_add(made);
        if self.nodes > NODES {
            return Err(format!("its pickle unfolds to more than {NODES} values"));
        }
        if value.depth > DEPTH {
            return Err(format!("its pickle is nested deeper than {DEPTH} levels"));
        }
        self.stack.push(value);
        Ok(())
    }

    fn pop(&mut self) -> Result<Value, Reason> {
        // A mark inside a value would make the reader take other values for marked than are followed here.
        if self
            .marks
            .last()
            .is_some_and(|mark| mark + 1 == self.stack.len())
        {
            return Err("its pickle takes a mark for a value".into());
        }
        self.stack
            .pop()
            .ok_or_else(|| "its pickle takes from an empty stack".into())
    }

    /// The last values become one that holds them.
    fn join(&mut self, count: usize) -> Result<(), Reason> {
        let joined = self.joined(count)?;
        self.push(joined, 1)
    }

    fn joined(&mut self, count: usize) -> Result<Value, Reason> {
        let mut joined = Value::default();
        for _ in 0..count {
            let value = self.pop()?;
            joined.add(value);
        }
        Ok(joined)
    }

    /// The last value takes in what `items` holds.
    fn extend(&mut self, items: Value) -> Result<(), Reason> {
        let mut container = self.pop()?;
        container.nodes = container.nodes.saturating_add(items.nodes);
        container.depth = container.depth.max(items.depth);
        self.push(container, 0)
    }

    /// The values above the last mark as one that holds them.
    fn above_mark(&mut self) -> Result<Value, Reason> {
        let mark = self.marks.pop().filter(|mark| *mark < self.stack.len());
        let mark = mark.ok_or("its pickle misses a mark")?;
        let mut joined = Value::default();
        for value in self.stack.drain(mark..) {
            joined.add(value);
        }
        Ok(joined)
    }

    fn put(&mut self, bytes: usize) -> Result<(), Reason> {
        let id = self.number(bytes)?;
        let value = self.pop()?;
        // Remembering copies.
        self.push(value, value.nodes + 1)?;
        self.memo.insert(id, value);
        Ok(())
    }

    fn get(&mut self, bytes: usize) -> Result<(), Reason> {
        let id = self.number(bytes)?;
        let value = self.memo.get(&id).copied();
        let value = value.ok_or("its pickle recalls what it never remembered")?;
        self.push(value, value.nodes + 1)
    }
}

impl Value {
    fn add(&mut self, part: Self) {
        self.nodes = self.nodes.saturating_add(part.nodes + 1);
        self.depth = self.depth.max(part.depth + 1);
    }
}
