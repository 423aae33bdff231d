//! Prompt editing: `[before:after:when]` and `[a|b]` become one text per stretch of the denoising loop.
//!
//! The text is read in one pass with an explicit stack, so depth costs memory, never call stack. Follows A1111's
//! `prompt_parser.get_learned_conditioning_prompt_schedules`: brackets that form nothing are literal, but only outside every
//! construct; a stray `|` or a lone final backslash makes the whole text literal.

/// Number of denoiser calls: steps, times two for a second-order sampler.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ScheduleSteps {
    /// Calls of the first pass.
    pub base: usize,
    /// Calls of the hires pass, when that is the pass to schedule.
    pub hires: Option<usize>,
}

/// How `when` is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum EditRule {
    /// A number with a dot is a fraction of the pass; in the hires pass fractions count from 1, steps from the base pass's end.
    #[default]
    Current,
    /// A1111 before 1.6: a number below 1 is a fraction of the base pass, in either pass.
    Old,
}

/// The texts of `text` over the pass, as `(end, text)`: `text` holds up to denoiser call `end`. Ends increase; the last is
/// the number of calls.
///
/// ```
/// use sdgen::prompt::{EditRule, ScheduleSteps, schedule};
/// let steps = ScheduleSteps { base: 10, hires: None };
/// assert_eq!(schedule("a [b:.5]", steps, EditRule::Current), [(5, "a ".into()), (10, "a b".into())]);
/// ```
#[must_use]
pub fn schedule(text: &str, steps: ScheduleSteps, rule: EditRule) -> Vec<(usize, String)> {
    let pass = Pass::new(steps, rule);
    let Some(tree) = Parser::parse(text) else {
        return vec![(pass.calls, text.to_string())];
    };
    let whens: Vec<i64> = tree.edits.iter().map(|edit| pass.boundary(edit)).collect();
    let mut ends: Vec<usize> = whens
        .iter()
        .filter(|&&when| when >= 1)
        .map(|&when| when as usize)
        .collect();
    if !tree.alternations.is_empty() {
        ends.extend(1..=pass.calls);
    }
    ends.push(pass.calls);
    ends.sort_unstable();
    ends.dedup();
    ends.into_iter()
        .map(|end| (end, tree.text_at(end, &whens)))
        .collect()
}

/// The pass's length and where its numbers count from.
struct Pass {
    calls: usize,
    rule: EditRule,
    fraction_offset: f64,
    step_offset: f64,
}

impl Pass {
    fn new(steps: ScheduleSteps, rule: EditRule) -> Self {
        match steps.hires {
            Some(hires) if rule == EditRule::Current => Self {
                calls: hires,
                rule,
                fraction_offset: 1.0,
                step_offset: steps.base as f64,
            },
            _ => Self {
                calls: steps.base,
                rule,
                fraction_offset: 0.0,
                step_offset: 0.0,
            },
        }
    }

    /// Last call of the `before` text; below 1 if it never holds.
    fn boundary(&self, when: &str) -> i64 {
        let calls = self.calls as f64;
        let number: f64 = when.parse().unwrap_or(0.0);
        let call = match self.rule {
            EditRule::Old if number < 1.0 => number * calls,
            EditRule::Old => number,
            EditRule::Current if when.contains('.') => (number - self.fraction_offset) * calls,
            EditRule::Current => number - self.step_offset,
        };
        (call as i64).min(self.calls as i64)
    }
}

/// A piece of the parsed text. Constructs are jumps, so that reading it needs no recursion.
#[derive(Debug, Clone, Copy)]
enum Node<'a> {
    /// Literal text; brackets and separators stay literal until they turn out to belong to a construct.
    Text(&'a str),
    /// `[before:after:when]`: go on at `before` up to the boundary of edit number `edit`, then at `after`.
    Edit {
        edit: usize,
        before: usize,
        after: usize,
    },
    /// `[a|b]`: take turns through alternation number `alternation`.
    Alternate { alternation: usize },
    /// End of an option: go on behind its construct.
    Jump(usize),
}

/// A text that parsed.
#[derive(Default)]
struct Tree<'a> {
    nodes: Vec<Node<'a>>,
    /// The number of each edit, as written.
    edits: Vec<&'a str>,
    /// Where the options of each alternation start.
    alternations: Vec<Vec<usize>>,
}

impl Tree<'_> {
    fn text_at(&self, call: usize, whens: &[i64]) -> String {
        let mut text = String::new();
        let mut at = 0;
        while let Some(node) = self.nodes.get(at) {
            at = match *node {
                Node::Text(piece) => {
                    text.push_str(piece);
                    at + 1
                }
                Node::Jump(end) => end,
                Node::Edit {
                    edit,
                    before,
                    after,
                } => {
                    if call as i64 <= whens[edit] {
                        before
                    } else {
                        after
                    }
                }
                Node::Alternate { alternation } => {
                    let starts = &self.alternations[alternation];
                    starts[(call + starts.len() - 1) % starts.len()]
                }
            };
        }
        text
    }
}

/// An open bracket and the separators read since, as indexes of their nodes.
struct Frame {
    square: bool,
    opener: usize,
    colons: Vec<usize>,
    pipes: Vec<usize>,
    /// Byte position behind the last colon.
    tail: usize,
}

/// Reads a text once. Every opening bracket is a frame; a frame that cannot become a construct voids all frames around it,
/// because a construct holds only whole constructs.
struct Parser<'a> {
    text: &'a str,
    tree: Tree<'a>,
    frames: Vec<Frame>,
}

impl<'a> Parser<'a> {
    /// `None` if the text has a `|` or a backslash that the grammar has no place for.
    fn parse(text: &'a str) -> Option<Tree<'a>> {
        let mut parser = Self {
            text,
            tree: Tree::default(),
            frames: Vec::new(),
        };
        let mut at = 0;
        while at < text.len() {
            let special = text[at..]
                .find(['\\', '[', ']', '(', ')', ':', '|'])
                .map_or(text.len(), |found| at + found);
            if special > at {
                parser.push_text(at, special);
                at = special;
                continue;
            }
            let mut end = at + 1;
            if text.as_bytes()[at] == b'\\' {
                end += text[end..]
                    .chars()
                    .next()
                    .filter(|&c| c != '\n')?
                    .len_utf8();
            }
            parser.push_text(at, end);
            parser.special(at)?;
            at = end;
        }
        parser.void_frames()?;
        Some(parser.tree)
    }

    fn push_text(&mut self, start: usize, end: usize) {
        self.tree.nodes.push(Node::Text(&self.text[start..end]));
    }

    /// Acts on the special character at byte `at`, which is already in the tree as text.
    fn special(&mut self, at: usize) -> Option<()> {
        let node = self.tree.nodes.len() - 1;
        match self.text.as_bytes()[at] {
            bracket @ (b'(' | b'[') => {
                self.frames.push(Frame {
                    square: bracket == b'[',
                    opener: node,
                    colons: Vec::new(),
                    pipes: Vec::new(),
                    tail: 0,
                });
            }
            b':' => {
                if let Some(frame) = self.frames.last_mut() {
                    frame.colons.push(node);
                    frame.tail = at + 1;
                }
            }
            b'|' => self
                .frames
                .last_mut()
                .filter(|frame| frame.square)?
                .pipes
                .push(node),
            bracket @ (b')' | b']') => {
                let closed = self
                    .frames
                    .pop_if(|frame| frame.square == (bracket == b']'));
                if !closed.is_some_and(|frame| self.close(&frame, at)) {
                    // Only `void_frames` knows of pipes in the frames that stay behind.
                    self.void_frames()?;
                }
            }
            _ => {}
        }
        Some(())
    }

    /// Turns a closed bracket into its construct; `false` if it is none.
    fn close(&mut self, frame: &Frame, at: usize) -> bool {
        match (
            frame.square,
            frame.colons.as_slice(),
            frame.pipes.as_slice(),
        ) {
            (false, [] | [_], []) | (true, [], []) => true,
            (true, [], pipes) => {
                let end = self.tree.nodes.len() - 1;
                let starts = std::iter::once(frame.opener)
                    .chain(pipes.iter().copied())
                    .map(|node| node + 1)
                    .collect();
                for &pipe in pipes {
                    self.tree.nodes[pipe] = Node::Jump(end);
                }
                self.tree.nodes[frame.opener] = Node::Alternate {
                    alternation: self.tree.alternations.len(),
                };
                self.tree.alternations.push(starts);
                // The closing bracket goes; what follows takes its index.
                self.tree.nodes.truncate(end);
                true
            }
            (true, &[.., end], []) if frame.colons.len() <= 2 => {
                let when = self.text[frame.tail..at].trim_matches(super::is_space);
                if !is_number(when) {
                    return false;
                }
                let (before, after) = match frame.colons[..] {
                    [first, _] => {
                        self.tree.nodes[first] = Node::Jump(end);
                        (frame.opener + 1, first + 1)
                    }
                    _ => (end, frame.opener + 1),
                };
                self.tree.nodes[frame.opener] = Node::Edit {
                    edit: self.tree.edits.len(),
                    before,
                    after,
                };
                self.tree.edits.push(when);
                // The last colon, the number and the bracket go.
                self.tree.nodes.truncate(end);
                true
            }
            _ => false,
        }
    }

    /// Leaves every open bracket as text; `None` if one holds a `|`, which text outside constructs must not.
    fn void_frames(&mut self) -> Option<()> {
        self.frames
            .drain(..)
            .all(|frame| frame.pipes.is_empty())
            .then_some(())
    }
}

/// A decimal number with optional sign, fraction and exponent; at least one digit before the exponent.
fn is_number(text: &str) -> bool {
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
    let (mantissa, exponent) = match unsigned.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (
            mantissa,
            Some(exponent.strip_prefix(['+', '-']).unwrap_or(exponent)),
        ),
        None => (unsigned, None),
    };
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    digits(whole)
        && digits(fraction)
        && whole.len() + fraction.len() > 0
        && exponent.is_none_or(|exponent| !exponent.is_empty() && digits(exponent))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_grammar() {
        for number in ["1", "-0", "+.5", "5.", "1e1", "1.5E-3"] {
            assert!(is_number(number), "{number}");
        }
        for text in ["", ".", "1e", "1e1.5", "--1", "0x1", "inf", "1_0", "١"] {
            assert!(!is_number(text), "{text}");
        }
    }

    #[test]
    fn zero_calls_and_huge_numbers_are_answered() {
        let steps = ScheduleSteps {
            base: 0,
            hires: None,
        };
        assert_eq!(
            schedule("[a|b]", steps, EditRule::Current),
            [(0, "b".into())]
        );
        let steps = ScheduleSteps {
            base: 10,
            hires: None,
        };
        assert_eq!(
            schedule("[a:b:1e999]", steps, EditRule::Current),
            [(10, "a".into())]
        );
        assert_eq!(
            schedule("[a:b:-1e999]", steps, EditRule::Current),
            [(10, "b".into())]
        );
    }
}
