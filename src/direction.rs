//! The two directions of a limit, seen from the pod, and what each is called: in the maps, to a person, and by Kubernetes.

use std::fmt;

use podshaper_abi::{EGRESS, INGRESS};

/// A direction, seen from the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// What the pod sends.
    Egress,
    /// What it receives.
    Ingress,
}

impl Direction {
    /// Both, in the order of their indices.
    pub const BOTH: [Self; 2] = [Self::Egress, Self::Ingress];

    /// The key of its entry in the `LIMITS` and `METERS` maps.
    pub fn index(self) -> u32 {
        match self {
            Self::Egress => EGRESS,
            Self::Ingress => INGRESS,
        }
    }

    /// Its name, for a person.
    pub fn name(self) -> &'static str {
        match self {
            Self::Egress => "egress",
            Self::Ingress => "ingress",
        }
    }

    /// Kubernetes' annotation for it.
    pub fn annotation(self) -> &'static str {
        match self {
            Self::Egress => "kubernetes.io/egress-bandwidth",
            Self::Ingress => "kubernetes.io/ingress-bandwidth",
        }
    }

    /// The annotation for its burst, in bits: Kubernetes has none.
    pub fn burst_annotation(self) -> &'static str {
        match self {
            Self::Egress => "podshaper.io/egress-burst",
            Self::Ingress => "podshaper.io/ingress-burst",
        }
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_are_in_the_order_of_the_maps() {
        for (place, direction) in Direction::BOTH.into_iter().enumerate() {
            assert_eq!(direction.index() as usize, place, "{direction}");
        }
    }
}
