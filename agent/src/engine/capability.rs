//! Pure: what can be done with the state of a model.

/// What the file says about the model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Traits {
    /// Some layers keep one state per sequence instead of one per token.
    pub(super) recurrent: bool,
    /// Tokens in the sliding window; 0: none.
    pub(super) sliding_window: u32,
    /// `{arch}.rope.scaling.type`
    pub(super) rope_scaling: Option<String>,
    /// `{arch}.rope.scaling.original_context_length`
    pub(super) original_context: Option<u32>,
}

/// What follows from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Capability {
    /// A sequence can be cut anywhere and its beginning shared. Recurrent states cannot be cut at all, and of a sliding
    /// window the cells before it are gone.
    pub(super) reuse: bool,
    /// Contexts up to this size and larger ones rotate positions differently (`LongRoPE`), so that keys do not survive
    /// the change from one to the other.
    pub(super) rope_switch: Option<u32>,
}

impl Capability {
    /// Judges a model.
    pub(super) fn of(traits: &Traits) -> Self {
        let Traits { recurrent, sliding_window, ref rope_scaling, original_context } = *traits;
        Self {
            reuse: !recurrent && sliding_window == 0,
            rope_switch: original_context.filter(|_| rope_scaling.as_deref() == Some("longrope")),
        }
    }

    /// Whether the state of a context of `from` cells is right in one of `to` cells.
    pub(super) fn state_survives(self, from: u32, to: u32) -> bool {
        self.rope_switch.is_none_or(|limit| (from > limit) == (to > limit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn judges() {
        let plain = Traits::default();
        let window = Traits { sliding_window: 512, ..plain.clone() };
        let recurrent = Traits { recurrent: true, ..plain.clone() };
        let yarn = Traits { rope_scaling: Some("yarn".to_owned()), original_context: Some(4096), ..plain.clone() };
        let long = Traits { rope_scaling: Some("longrope".to_owned()), ..yarn.clone() };
        let cases = [
            (plain, true, None),
            (window, false, None),
            (recurrent, false, None),
            (yarn, true, None),
            (long, true, Some(4096)),
        ];
        for (traits, reuse, rope_switch) in cases {
            assert_eq!(Capability::of(&traits), Capability { reuse, rope_switch }, "{traits:?}");
        }
    }

    #[test]
    fn keys_do_not_survive_another_rotation() {
        let long = Capability { reuse: true, rope_switch: Some(4096) };
        assert!(long.state_survives(2048, 4096));
        assert!(!long.state_survives(4096, 6144));
        assert!(!long.state_survives(6144, 4096));
        assert!(long.state_survives(6144, 8192));
        assert!(Capability { reuse: true, rope_switch: None }.state_survives(4096, 8192));
    }
}
