//! The two directions of a limit, seen from the pod, and the name of each: in the maps, for a person, and in
//! Kubernetes.

use std::fmt;

use podshaper_abi::{EGRESS, INGRESS};

/// A direction, seen from the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Packets that the pod sends.
    Egress,
    /// Packets that the pod receives.
    Ingress,
}

impl Direction {
    /// Both directions, in the order of their indices.
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

    /// Kubernetes' annotation for the limit.
    pub fn annotation(self) -> &'static str {
        match self {
            Self::Egress => "kubernetes.io/egress-bandwidth",
            Self::Ingress => "kubernetes.io/ingress-bandwidth",
        }
    }

    /// podshaper's annotation for the burst, in bits: Kubernetes has none.
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
