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
    /// `{arch}.context_length`
    pub(super) trained_context: u32,
    /// It has rotations for short contexts and for long ones (`LongRoPE`), which not every such file says by its type.
    pub(super) two_rotations: bool,
}

/// Where the state of a sequence can be cut, so that another prompt goes on from there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cut {
    /// At any token.
    Anywhere,
    /// Where this many tokens before the cut are still there: of a sliding window, what lies before it goes.
    Window(u32),
    /// Nowhere: there is the state at the end and no other (Mamba, RWKV, hybrids).
    Nowhere,
}

/// What follows from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Capability {
    /// Where a sequence can be cut. Where that is not everywhere, copies of the state are made on the way.
    pub(super) cut: Cut,
    /// Contexts up to this size and larger ones rotate positions differently (`LongRoPE`), so that keys do not survive
    /// the change from one to the other.
    pub(super) rope_switch: Option<u32>,
}

impl Capability {
    /// Judges a model.
    pub(super) fn of(traits: &Traits) -> Self {
        let Traits { recurrent, sliding_window, ref rope_scaling, original_context, trained_context, two_rotations } =
            *traits;
        let switches = two_rotations || rope_scaling.as_deref() == Some("longrope");
        Self {
            cut: match (recurrent, sliding_window) {
                (true, _) => Cut::Nowhere,
                (false, 0) => Cut::Anywhere,
                (false, window) => Cut::Window(window),
            },
            rope_switch: switches.then(|| original_context.unwrap_or(trained_context)),
        }
    }

    /// The capability after llama.cpp was asked to cut a sequence in its middle, and did so or not.
    pub(super) fn tested(self, did_cut: bool) -> Self {
        if did_cut { self } else { Self { cut: Cut::Nowhere, ..self } }
    }

    /// Whether the state of a context of `from` cells is right in one of `to` cells.
    pub(super) fn state_survives(self, from: u32, to: u32) -> bool {
        self.rope_switch.is_none_or(|limit| (from > limit) == (to > limit))
    }

    /// Whether the tokens that a sequence has just got can be taken away again, so that they may be guesses.
    pub(super) fn can_speculate(self) -> bool {
        self.cut != Cut::Nowhere
    }

    /// Whether that holds only where all of a step is computed at once: what a sliding window has left behind is written
    /// over with every micro-batch.
    pub(super) fn speculates_in_one_piece(self) -> bool {
        matches!(self.cut, Cut::Window(_))
    }

    /// Whether copies of the state have to be made on the way.
    pub(super) fn needs_snapshots(self) -> bool {
        self.cut != Cut::Anywhere
    }

    /// A sequence whose first `oldest` positions are gone from the cache can be cut at this length and at greater ones.
    /// Its full length is always allowed: nothing is cut there.
    pub(super) fn cut_from(self, oldest: u32) -> usize {
        match self.cut {
            Cut::Anywhere => 0,
            Cut::Window(_) if oldest == 0 => 0,
            Cut::Window(window) => oldest.saturating_add(window) as usize,
            Cut::Nowhere => usize::MAX,
        }
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
        let hybrid = Traits { recurrent: true, ..window.clone() };
        let yarn = Traits { rope_scaling: Some("yarn".to_owned()), original_context: Some(4096), ..plain.clone() };
        let long = Traits { rope_scaling: Some("longrope".to_owned()), ..yarn.clone() };
        let unsaid = Traits { two_rotations: true, rope_scaling: None, ..yarn.clone() };
        let default = Traits { two_rotations: true, trained_context: 2048, ..plain.clone() };
        let cases = [
            (unsaid, Cut::Anywhere, Some(4096)),
            (default, Cut::Anywhere, Some(2048)),
            (plain, Cut::Anywhere, None),
            (window, Cut::Window(512), None),
            (recurrent, Cut::Nowhere, None),
            (hybrid, Cut::Nowhere, None),
            (yarn, Cut::Anywhere, None),
            (long, Cut::Anywhere, Some(4096)),
        ];
        for (traits, cut, rope_switch) in cases {
            assert_eq!(Capability::of(&traits), Capability { cut, rope_switch }, "{traits:?}");
        }
    }

    #[test]
    fn only_what_can_be_cut_speculates() {
        let with = |cut| Capability { cut, rope_switch: None };
        let cases = [(Cut::Anywhere, true, false), (Cut::Window(512), true, true), (Cut::Nowhere, false, false)];
        for (cut, can, in_one_piece) in cases {
            assert_eq!(
                (with(cut).can_speculate(), with(cut).speculates_in_one_piece()),
                (can, in_one_piece),
                "{cut:?}"
            );
        }
    }

    #[test]
    fn keys_do_not_survive_another_rotation() {
        let long = Capability { cut: Cut::Anywhere, rope_switch: Some(4096) };
        assert!(long.state_survives(2048, 4096));
        assert!(!long.state_survives(4096, 6144));
        assert!(!long.state_survives(6144, 4096));
        assert!(long.state_survives(6144, 8192));
        assert!(Capability { rope_switch: None, ..long }.state_survives(4096, 8192));
    }

    #[test]
    fn cuts() {
        let with = |cut| Capability { cut, rope_switch: None };
        let cases = [
            (Cut::Anywhere, 0, 0),
            (Cut::Anywhere, 700, 0),
            (Cut::Window(512), 0, 0),
            (Cut::Window(512), 100, 612),
            (Cut::Nowhere, 0, usize::MAX),
        ];
        for (cut, oldest, expected) in cases {
            assert_eq!(with(cut).cut_from(oldest), expected, "{cut:?} {oldest}");
        }
        assert_eq!(with(Cut::Window(8)).tested(true).cut, Cut::Window(8));
        assert_eq!(with(Cut::Anywhere).tested(false).cut, Cut::Nowhere);
    }
}
